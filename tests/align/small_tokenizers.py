"""Small tokenizers of every kind, trained on the spot."""

from __future__ import annotations

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs, héllo wörld",
    "def f(x):\n    return x + 1\n\n\tdone 漢字 かな 🙂",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def make_byte_level(*, vocab_size: int = 330, add_prefix_space: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return backend


def make_qwen_like() -> Tokenizer:
    """ByteLevel inside Sequences, as in Qwen and Llama 3."""
    backend = make_byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return backend


def sentencepiece_vocab() -> tuple[dict[str, int], list[tuple[str, str]]]:
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "t", "h", "e", "o", "w", "ö", "漢", "th", "▁th", "▁the", "▁▁", "▁▁▁▁"]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("▁", "▁"), ("▁▁", "▁▁")]
    return {piece: token for token, piece in enumerate(pieces)}, merges


def make_byte_fallback(*, prefix_space: bool = True) -> Tokenizer:
    """As Llama 2 (prefix space) or Gemma (none, and runs of spaces as added tokens)."""
    vocab, merges = sentencepiece_vocab()
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", "▁")
    if prefix_space:
        steps.append(decoders.Strip(" ", 1, 0))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        backend.normalizer = replace
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("<t▁x>", normalized=False)])
    return backend


def make_unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def make_wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[CLS]"], show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend
