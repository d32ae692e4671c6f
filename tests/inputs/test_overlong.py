"""Rows longer than max_length, and the configuration that says what becomes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.errors import InputError, UsageError
from kdstore.inputs import InputConfig
from tests.inputs.input_helpers import builder, chat, readable
from tests.inputs.input_tokenizers import CHATML, byte_level

IDS = list(range(20, 30))
LABELS = [-100] * 5 + IDS[5:]


def pieces(row: dict[str, Any], **options: Any) -> tuple[list[Any], Any]:
    made = builder(byte_level(CHATML), **options)
    return made.samples(0, row), made.counters


def test_split_cuts_tokens_and_spans() -> None:
    row = {"id": "a", "input_ids": IDS, "labels": LABELS, "metadata": {"k": 1}, "text": "t"}
    samples, counters = pieces(row, max_length=4, keep_text=True)
    assert [s.sample_id for s in samples] == ["a#0", "a#1", "a#2"]
    assert [s.input_ids_T.tolist() for s in samples] == [IDS[:4], IDS[4:8], IDS[8:]]
    spans = [[(p.start, p.end, p.supervised) for p in s.spans] for s in samples]
    assert spans == [[(0, 4, False)], [(0, 1, False), (1, 4, True)], [(0, 2, True)]]
    assert [s.text for s in samples] == ["t", None, None]
    assert all(s.metadata == {"k": 1} for s in samples)
    assert (counters.num_split, counters.num_samples, counters.num_tokens) == (1, 3, 10)
    assert (counters.num_truncated, counters.tokens_dropped, counters.num_unsupervised) == (0, 0, 1)


def test_a_row_of_exactly_max_length_is_whole() -> None:
    for overlong in ("split", "truncate", "error"):
        samples, counters = pieces({"id": "a", "input_ids": IDS}, max_length=10, overlong=overlong)
        assert [s.sample_id for s in samples] == ["a"]
        assert counters.num_split == counters.num_truncated == 0


def test_truncate_keeps_the_beginning_and_counts() -> None:
    row = {"id": "a", "input_ids": IDS, "labels": LABELS}
    samples, counters = pieces(row, max_length=6, overlong="truncate")
    assert [(s.sample_id, s.input_ids_T.tolist()) for s in samples] == [("a", IDS[:6])]
    assert [(p.start, p.end, p.supervised) for p in samples[0].spans] == [
        (0, 5, False),
        (5, 6, True),
    ]
    assert (counters.num_truncated, counters.tokens_dropped, counters.num_split) == (1, 4, 0)


def test_error_names_sample_length_and_ways_out() -> None:
    with pytest.raises(InputError) as caught:
        pieces({"id": "a", "input_ids": IDS}, max_length=6, overlong="error")
    for word in ("row 0 of src", "'a'", "at most 6", "10 tokens", "split", "truncate"):
        assert word in str(caught.value)


def test_every_piece_of_a_text_begins_with_bos() -> None:
    tokenizer = byte_level(adds_bos=True)
    made = builder(tokenizer, max_length=5)
    samples = made.samples(0, {"text": "cat is the answer cat is the answer"})
    spans = [readable(tokenizer, sample) for sample in samples]
    assert spans == [
        [("template", "<s>", False), ("text", "cat is the answer", True)],
        [("template", "<s>", False), ("text", " cat is the answer", True)],
        [("template", "<s>", False), ("text", "</s>", True)],
    ]
    assert all(sample.num_tokens <= 5 for sample in samples)


def test_a_chat_is_cut_as_it_is() -> None:
    tokenizer = byte_level(CHATML, adds_bos=True)
    row = chat("what is it", "the answer is the cat")
    (whole,) = builder(tokenizer).samples(0, row)
    parts = builder(tokenizer, max_length=6).samples(0, row)
    assert [t for part in parts for t in part.input_ids_T] == whole.input_ids_T.tolist()
    flags = [span.supervised for part in parts for span in part.spans for _ in _tokens(span)]
    assert flags == [span.supervised for span in whole.spans for _ in _tokens(span)]


@given(st.integers(1, 40), st.integers(2, 12), st.booleans())
def test_splitting_loses_nothing(length: int, max_length: int, adds_bos: bool) -> None:
    tokenizer = byte_level(adds_bos=adds_bos)
    text = "a" * length
    (whole,) = builder(tokenizer).samples(0, {"text": text})
    parts = builder(tokenizer, max_length=max_length).samples(0, {"text": text})
    assert all(part.num_tokens <= max_length for part in parts)
    assert len({part.sample_id for part in parts}) == len(parts)
    skip = int(adds_bos)
    joined = [token for part in parts for token in part.input_ids_T[skip:]]
    assert joined == whole.input_ids_T[skip:].tolist()
    for part in parts:
        readable(tokenizer, part)


def test_config_round_trip() -> None:
    config = InputConfig(
        max_length=128, overlong="error", add_bos="never", template_options={"a": [1]}
    )
    assert InputConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UsageError, match="max_len"):
        InputConfig.from_dict({"max_len": 3})


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 1},
        {"max_length": -5},
        {"overlong": "drop"},
        {"add_bos": True},
        {"add_eos": "yes"},
        {"template_date": "today"},
        {"template_options": {"tokenize": True}},
        {"template_options": {"f": {1}}},
    ],
)
def test_config_refuses_what_it_does_not_know(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        InputConfig(**options)


def _tokens(span: Any) -> range:
    return range(span.start, span.end)
