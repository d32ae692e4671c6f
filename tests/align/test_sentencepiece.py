"""TokenTable against a real SentencePiece model that transformers converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizerFast

from kdstore.align import TokenFlag, TokenTable
from tests.align.small_tokenizers import TEXT

sentencepiece = pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the ``tokenizer.model`` of a BPE model with byte fallback."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 10),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> LlamaTokenizerFast:
    return LlamaTokenizerFast.from_pretrained(folder)


def test_every_id_is_what_sentencepiece_says(processor, tokenizer) -> None:
    table = TokenTable.from_tokenizer(tokenizer)
    assert (table.kind, table.prefix_space, len(table)) == ("byte_fallback", True, len(processor))
    ids = range(len(processor))
    is_byte = np.array([processor.is_byte(token) for token in ids])
    is_special = np.array([processor.is_control(t) or processor.is_unknown(t) for t in ids])
    np.testing.assert_array_equal(table.has_flag(TokenFlag.BYTE), is_byte)
    np.testing.assert_array_equal(table.has_flag(TokenFlag.SPECIAL), is_special)
    for token in np.flatnonzero(~is_byte & ~is_special).tolist():
        piece = processor.id_to_piece(token)
        assert table.decode([token]) == piece.replace("▁", " ").encode()


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"), min_size=1))
def test_sentencepiece_ids_give_the_text(processor, tokenizer, text: str) -> None:
    """The ids are SentencePiece's own, so the conversion's encoder plays no part."""
    table = TokenTable.from_tokenizer(tokenizer)
    assert table.decode(processor.encode(text)) == (" " + text).encode()
