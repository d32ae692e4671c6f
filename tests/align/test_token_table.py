"""TokenTable against the tokenizers it was read from."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kdstore.align import TokenFlag, TokenTable
from kdstore.errors import SignalError, TeacherError
from tests.align.small_tokenizers import (
    TEXT,
    make_byte_fallback,
    make_byte_level,
    make_qwen_like,
    make_unigram,
    make_wordpiece,
    sentencepiece_vocab,
    wrap,
)

MAKERS = {
    "byte_level": make_byte_level,
    "byte_level_prefixed": lambda: make_byte_level(add_prefix_space=True),
    "qwen_like": make_qwen_like,
    "byte_fallback": make_byte_fallback,
    "gemma_like": lambda: make_byte_fallback(prefix_space=False),
    "unigram": make_unigram,
    "wordpiece": make_wordpiece,
}
# No surrogates: they are no text. No "▁": SentencePiece reads it as a space.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60)
spaced_texts = st.lists(
    st.sampled_from(
        ["the", " ", "  ", "\n", "漢字", "🙂👩‍👩‍👧", "é", "e\u0301", "\x00", "<0x0A>", "w"]
    )
).map("".join)


@cache
def pair(name: str):
    tokenizer = wrap(MAKERS[name]())
    return tokenizer, TokenTable.from_tokenizer(tokenizer)


def round_trip(name: str, text: str) -> bytes:
    tokenizer, table = pair(name)
    return table.decode(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("name", ["byte_level", "qwen_like", "gemma_like"])
@settings(deadline=None)
@given(text=st.one_of(texts, spaced_texts))
@example(text=" leading and trailing  \n")
def test_tokens_give_the_text_exactly(name: str, text: str) -> None:
    assert round_trip(name, text) == text.encode()


@settings(deadline=None)
@given(text=st.one_of(texts, spaced_texts))
@example(text=" already spaced")
def test_byte_fallback_gives_the_text_with_one_prefix_space(text: str) -> None:
    assert round_trip("byte_fallback", text) == ((" " + text) if text else "").encode()


@settings(deadline=None)
@given(text=st.one_of(texts, spaced_texts))
def test_byte_level_with_prefix_space(text: str) -> None:
    expected = text if text == "" or text.startswith(" ") else " " + text
    assert round_trip("byte_level_prefixed", text) == expected.encode()


@settings(deadline=None)
@given(text=st.text(sorted(set("".join(TEXT)))))
def test_unigram_gives_the_text_of_its_alphabet(text: str) -> None:
    expected = text if text == "" or text.startswith(" ") else " " + text
    assert round_trip("unigram", text) == expected.encode()


def test_wordpiece_glues_continuations() -> None:
    assert round_trip("wordpiece", "the quick  jugs") == b" the quick jugs"


@pytest.mark.parametrize(
    ("name", "kind", "prefix_space"),
    [
        ("byte_level", "byte_level", False),
        ("byte_level_prefixed", "byte_level", True),
        ("qwen_like", "byte_level", False),
        ("byte_fallback", "byte_fallback", True),
        ("gemma_like", "byte_fallback", False),
        ("unigram", "unigram", True),
        ("wordpiece", "wordpiece", True),
    ],
)
def test_kind_and_prefix_space(name: str, kind: str, prefix_space: bool) -> None:
    table = pair(name)[1]
    assert (table.kind, table.prefix_space) == (kind, prefix_space)


def test_byte_level_alphabet_has_every_byte() -> None:
    tokenizer, table = pair("byte_level")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = [table.decode([tokenizer.convert_tokens_to_ids(piece)]) for piece in alphabet]
    assert sorted(tokens) == [bytes([byte]) for byte in range(256)]
    assert not table.has_flag(TokenFlag.BYTE | TokenFlag.UNKNOWN).any()


@pytest.mark.parametrize("name", MAKERS)
def test_every_id_decodes_as_the_tokenizer_decodes_it(name: str) -> None:
    """Against the tokenizers library, for text that is whole UTF-8 between two plain tokens."""
    tokenizer, table = pair(name)
    anchor = table.decode(ids := tokenizer("the", add_special_tokens=False).input_ids)
    added = TokenFlag.SPECIAL | TokenFlag.ADDED
    for token in np.flatnonzero(~table.has_flag(added | TokenFlag.BYTE)).tolist():
        ours = (anchor + table.decode([token]) + anchor).decode(errors="replace")
        theirs = tokenizer.backend_tokenizer.decode([*ids, token, *ids])
        assert ours.removeprefix(" ") == theirs.removeprefix(" ")


def test_byte_fallback_tokens_are_single_bytes() -> None:
    tokenizer, table = pair("byte_fallback")
    byte_ids = np.flatnonzero(table.has_flag(TokenFlag.BYTE))
    assert [table.decode([token]) for token in byte_ids] == [bytes([b]) for b in range(256)]
    assert byte_ids[0] == tokenizer.convert_tokens_to_ids("<0x00>")


def test_special_and_added_tokens_are_literal_and_flagged() -> None:
    tokenizer, table = pair("byte_level")
    end, think = tokenizer.convert_tokens_to_ids(["<|end|>", "<think>"])
    assert table.decode([end, think]) == b"<|end|><think>"
    assert table.flags_V[end] == TokenFlag.SPECIAL
    assert table.flags_V[think] == TokenFlag.ADDED
    assert np.count_nonzero(table.flags_V) == 2


def test_byte_level_added_token_outside_ascii_is_literal() -> None:
    backend = make_byte_level()
    backend.add_tokens([AddedToken("é漢 ▁", normalized=False)])
    table = TokenTable.from_tokenizer(tokenizer := wrap(backend))
    text = "the é漢 ▁ dog"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(table) - 1 in ids
    assert table.decode(ids) == text.encode()


def test_added_pieces_of_the_vocabulary_keep_their_spaces() -> None:
    """Gemma lists runs of ▁ as added tokens; the model makes them of spaces."""
    tokenizer, table = pair("gemma_like")
    run, literal = tokenizer.convert_tokens_to_ids(["▁▁", "<t▁x>"])
    assert tokenizer("  ", add_special_tokens=False).input_ids == [run]
    assert table.decode([run]) == b"  "
    assert table.decode([literal]) == "<t▁x>".encode()
    assert table.flags_V[[run, literal]].tolist() == [TokenFlag.ADDED] * 2


def test_unknown_token_is_flagged_only_where_it_can_occur() -> None:
    tokenizer, table = pair("unigram")
    unknown = tokenizer("☃", add_special_tokens=False).input_ids[-1]
    assert table.flags_V[unknown] == TokenFlag.SPECIAL | TokenFlag.UNKNOWN
    assert np.count_nonzero(table.has_flag(TokenFlag.UNKNOWN)) == 1
    assert pair("wordpiece")[1].flags_V[0] == TokenFlag.SPECIAL | TokenFlag.UNKNOWN
    assert not pair("byte_fallback")[1].has_flag(TokenFlag.UNKNOWN).any()


def test_metaspace_bpe_without_byte_fallback() -> None:
    vocab = {"<unk>": 0, "▁": 1, "<0x41>": 2, "a": 3}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    table = TokenTable.from_tokenizer(wrap(backend))
    assert (table.kind, table.bytes_V) == ("metaspace", (b"<unk>", b" ", b"<0x41>", b"a"))
    assert table.flags_V.tolist() == [TokenFlag.UNKNOWN, 0, 0, 0]


def test_unigram_with_byte_fallback() -> None:
    pieces = [("<unk>", 0.0), ("▁", -1.0), *((f"<0x{b:02X}>", -9.0) for b in range(256))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    table = TokenTable.from_tokenizer(tokenizer := wrap(backend))
    assert table.decode(tokenizer("é 🙂", add_special_tokens=False).input_ids) == "é 🙂".encode()
    assert table.kind == "unigram"
    assert np.count_nonzero(table.flags_V) == 256


def test_holes_are_null_and_refused() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    backend.decoder = decoders.ByteLevel()
    table = TokenTable.from_tokenizer(wrap(backend))
    assert table.bytes_V == (b"a", None, None, None, None, b"b")
    assert table.has_flag(TokenFlag.UNUSED).tolist() == [False, True, True, True, True, False]
    assert table.decode([5, 0]) == b"ba"
    for wrong in (1, 6, -1):
        with pytest.raises(SignalError, match=f"(?s)position 1.*got: {wrong}"):
            table.decode([0, wrong])


def test_decode_of_nothing_is_empty() -> None:
    assert pair("byte_level")[1].decode([]) == b""


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({"a": 0}, []),
        models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"),
        models.WordLevel({"a": 0}, unk_token="a"),
    ],
)
def test_unknown_kinds_are_refused(model: models.Model) -> None:
    backend = Tokenizer(model)
    if getattr(model, "end_of_word_suffix", None):  # CLIP
        backend.decoder = decoders.ByteLevel()
    with pytest.raises(TeacherError, match=r"(?s)unknown tokenizer kind.*to do"):
        TokenTable.from_tokenizer(wrap(backend))


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(TeacherError, match=r"(?s)no fast backend.*got: object"):
        TokenTable.from_tokenizer(object())


def test_fingerprint_ignores_merges_and_normaliser() -> None:
    vocab, merges = sentencepiece_vocab()
    fewer = Tokenizer(models.BPE(vocab, merges[:2], unk_token="<unk>", byte_fallback=True))
    full = make_byte_fallback()
    fewer.pre_tokenizer = pre_tokenizers.Metaspace()
    fewer.decoder = full.decoder
    for token in full.get_added_tokens_decoder().values():
        (fewer.add_special_tokens if token.special else fewer.add_tokens)([token])
    assert full.encode("the").ids != fewer.encode("the").ids
    tables = [TokenTable.from_tokenizer(wrap(backend)) for backend in (full, fewer)]
    assert tables[0].fingerprint() == tables[1].fingerprint()


def test_fingerprint_tells_any_change() -> None:
    table = TokenTable("byte_level", (b"ab", b"c", None), np.array([0, 0, 8], np.uint8))
    others = [
        dataclasses.replace(table, bytes_V=(b"a", b"bc", None)),
        dataclasses.replace(table, bytes_V=(b"c", b"ab", None)),
        dataclasses.replace(table, flags_V=np.array([0, 2, 8], np.uint8)),
        TokenTable("byte_level", (b"ab", b"c"), np.zeros(2, np.uint8)),
        TokenTable("byte_level", (b"ab", b"c", b""), np.zeros(3, np.uint8)),
    ]
    assert len({one.fingerprint() for one in [table, *others]}) == 6
    assert dataclasses.replace(table, kind="unigram").fingerprint() == table.fingerprint()


def test_fingerprint_is_frozen() -> None:
    """Stores compare it across versions: a change here is a change of format."""
    table = TokenTable("byte_level", (b"ab", b"\xff", None), np.array([0, 1, 8], np.uint8))
    stream = b"kdstore.token_table.1\0" + struct.pack("<q3i3B", 3, 2, 1, -1, 0, 1, 8) + b"ab\xff"
    assert table.fingerprint() == hashlib.sha256(stream).hexdigest()
    assert table.fingerprint().startswith("402b7a3772fabd27")


def test_contradicting_arrays_are_refused() -> None:
    with pytest.raises(SignalError, match="one flag per id"):
        TokenTable("byte_level", (b"a",), np.zeros(2, np.uint8))
    with pytest.raises(SignalError, match="null exactly where"):
        TokenTable("byte_level", (b"a", None), np.zeros(2, np.uint8))


def test_vocabulary_beyond_16_bits() -> None:
    size = 70_000
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [a + b for a in alphabet for b in alphabet]
    pieces += [a + b + "a" for a in alphabet for b in alphabet]
    vocab = {piece: token for token, piece in enumerate(pieces[:size])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.decoder = decoders.ByteLevel()
    table = TokenTable.from_tokenizer(wrap(backend))
    again = TokenTable.from_bytes(table.to_bytes())
    assert len(again) == size
    assert again.bytes_V == table.bytes_V
    assert again.decode([size - 1])[-1:] == b"a"
    assert again.fingerprint() == table.fingerprint()


def test_import_needs_neither_transformers_nor_torch() -> None:
    code = (
        "import sys, kdstore.align; print({'torch', 'transformers', 'tokenizers'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
