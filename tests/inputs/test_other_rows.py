"""Rows of input_ids, text, prompt and completion; ids, metadata and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdstore.errors import InputError, UsageError
from kdstore.inputs import InputConfig, SampleBuilder, open_source
from tests.inputs.input_helpers import builder, chat, one_sample, readable, supervised
from tests.inputs.input_tokenizers import CHATML, byte_level, words

TEXT = "hello world"


def test_text_is_supervised_and_ends() -> None:
    tokenizer = byte_level()
    sample = one_sample(tokenizer, {"text": TEXT})
    assert readable(tokenizer, sample) == [("text", "hello world</s>", True)]
    assert sample.input_ids_T.dtype == np.int32
    assert sample.text is None


@pytest.mark.parametrize(
    ("adds_bos", "add_bos", "begins"),
    [
        (False, "auto", False),
        (True, "auto", True),
        (False, "always", True),
        (True, "never", False),
    ],
)
def test_bos_policy(adds_bos: bool, add_bos: str, begins: bool) -> None:
    tokenizer = byte_level(adds_bos=adds_bos)
    made = builder(tokenizer, add_bos=add_bos)
    for row in ({"text": TEXT}, {"prompt": "hello", "completion": " world"}):
        (sample,) = made.samples(0, row)
        spans = readable(tokenizer, sample)
        assert (spans[0] == ("template", "<s>", False)) is begins
        assert sample.input_ids_T.tolist().count(tokenizer.bos_token_id) == int(begins)
    policy = made.policy()
    assert policy["add_bos"] is begins
    assert policy["bos_token_id"] == (tokenizer.bos_token_id if begins else None)


def test_tokens_that_the_text_brings_are_not_doubled() -> None:
    tokenizer = byte_level(adds_bos=True)
    sample = one_sample(tokenizer, {"text": "<s>hello world</s>"})
    assert tokenizer.decode(sample.input_ids_T) == "<s>hello world</s>"
    assert readable(tokenizer, sample)[0] == ("template", "<s>", False)
    sample = one_sample(tokenizer, {"prompt": "<s>hello", "completion": " world</s>"})
    assert [text for _, text, _ in readable(tokenizer, sample)] == ["<s>", "hello", " world</s>"]
    alone = one_sample(tokenizer, {"text": "<s>"})
    assert tokenizer.decode(alone.input_ids_T) == "<s></s>"


def test_eos_policy() -> None:
    tokenizer = byte_level()
    without = one_sample(tokenizer, {"text": TEXT}, add_eos="never")
    assert tokenizer.decode(without.input_ids_T) == TEXT
    bare = words()
    assert builder(bare).policy()["add_eos"] is False
    for name in ("add_bos", "add_eos"):
        with pytest.raises(UsageError, match="has no") as caught:
            builder(bare, **{name: "always"})
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "completion", "asked", "answered"),
    [
        ("Answer:", " 42", "Answer:", " 42</s>"),
        ("Answer: ", "42", "Answer:", " 42</s>"),  # the token " 42" is the answer's
        ("ans", "wer is", "answer", " is</s>"),  # the token "answer" is the prompt's
        ("line\n", "\nthe cat", "line\n\n", "the cat</s>"),
        ("", "the cat", None, "the cat</s>"),
        ("the cat", "", "the cat", "</s>"),
    ],
)
def test_the_border_of_prompt_and_completion(
    prompt: str, completion: str, asked: str | None, answered: str
) -> None:
    tokenizer = byte_level()
    sample = one_sample(tokenizer, {"prompt": prompt, "completion": completion})
    expected = [("user", asked, False)] if asked else []
    assert readable(tokenizer, sample) == [*expected, ("assistant", answered, True)]
    ids = tokenizer(prompt + completion)["input_ids"]
    assert sample.input_ids_T.tolist() == [*ids, tokenizer.eos_token_id]


def test_input_ids_are_taken_as_they_are() -> None:
    tokenizer = byte_level(adds_bos=True)
    sample = one_sample(tokenizer, {"input_ids": [5, 6, 7]})
    assert sample.input_ids_T.tolist() == [5, 6, 7]
    assert [(s.start, s.end, s.kind, s.supervised) for s in sample.spans] == [(0, 3, "text", True)]


def test_labels_say_what_is_supervised() -> None:
    row = {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [-100, -100, 7, -100, 9],
        "attention_mask": [1] * 5,
    }
    sample = one_sample(byte_level(), row)
    spans = [(s.start, s.end, s.supervised) for s in sample.spans]
    assert spans == [(0, 2, False), (2, 3, True), (3, 4, False), (4, 5, True)]
    assert sample.with_score_rule("supervised").runs == ((2, 3), (4, 5))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"input_ids": [1, -2]}, r"input_ids\[1\]"),
        ({"input_ids": [1, 2**31]}, r"input_ids\[1\]"),
        ({"input_ids": [1, 2**70]}, "integers"),
        ({"input_ids": [1, 2.0]}, r"input_ids\[1\]"),
        ({"input_ids": [True]}, r"input_ids\[0\]"),
        ({"input_ids": [1, None]}, "NoneType"),
        ({"input_ids": "12"}, "str"),
        ({"input_ids": [[1]]}, "list"),
        ({"input_ids": [1, 2], "labels": [1]}, "differ in length"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, r"labels\[0\]"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "padded"),
        ({"text": None}, "text .null."),
        ({"text": 3}, "int"),
        ({"text": ["a"]}, "list"),
        ({"prompt": "a"}, "prompt .str."),
        ({"prompt": "a", "completion": 1}, "str and int"),
        ({"prompt": [], "completion": "a"}, "list and str"),
        ({"messages": "hello"}, "not a list of messages"),
        ({"messages": ["hello"]}, r"messages\[0\]"),
        ({"messages": [{"from": "human", "value": "x"}]}, "not a message"),
        ({"messages": [{"role": "user", "content": None}]}, "without text"),
        ({"messages": [{"role": "user", "content": 3}]}, "without text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({**chat("a"), "tools": "{"}, "tools is not JSON"),
        ({**chat("a"), "tools": [1]}, "tools is not a list"),
        ({"conversations": [], "source": "x"}, r"conversations .list., source .str."),
        ({}, "empty row"),
        ({"text": "a", "id": 1.5}, "id cannot name"),
        ({"text": "a", "id": ""}, "id cannot name"),
        ({"text": "a", "id": True}, "id cannot name"),
        ({"text": "a", "metadata": "x"}, "metadata cannot be kept"),
        ({"text": "a", "metadata": {"x": {1, 2}}}, "metadata cannot be kept"),
    ],
)
def test_rows_that_cannot_be_used_are_named(row: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=found) as caught:
        builder(byte_level(CHATML)).samples(12, row)
    assert "row 12 of src" in str(caught.value)


def test_a_row_without_usable_fields_lists_the_accepted_ones() -> None:
    with pytest.raises(InputError) as caught:
        builder(byte_level()).samples(0, {"body": "x"})
    for word in ("input_ids", "messages", "prompt and completion", "text", "body (str)", "to do"):
        assert word in str(caught.value)


def test_errors_say_where_the_row_is(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": 3}\n')
    source = open_source(path)
    made = SampleBuilder(byte_level(), InputConfig(), source.name, locate=source.locate)
    (_, first), (number, second) = source.rows()
    assert made.samples(0, first)[0].sample_id == "data:0"
    with pytest.raises(InputError, match=r"data\.jsonl, line 3"):
        made.samples(number, second)
    assert made.counters.num_rows == 1


def test_the_first_usable_field_wins() -> None:
    tokenizer = byte_level(CHATML)
    row: dict[str, Any] = {
        "text": "text",
        "prompt": "prompt",
        "completion": "completion",
        **chat("x", "messages"),
        "input_ids": tokenizer("input_ids")["input_ids"],
    }
    for used, field in (
        ("input_ids", "input_ids"),
        ("messages<|im_end|>", "messages"),
        ("completion</s>", "completion"),
        ("text</s>", "text"),
    ):
        sample = one_sample(tokenizer, row)
        ends = tokenizer.decode(sample.input_ids_T).strip()
        assert ends.endswith(used)
        row[field] = None  # Parquet gives null for a field that this row lacks


def test_sample_ids_and_metadata() -> None:
    tokenizer = byte_level()
    assert one_sample(tokenizer, {"text": "a", "id": "x"}).sample_id == "x"
    assert one_sample(tokenizer, {"text": "a", "id": 0}).sample_id == "0"
    assert one_sample(tokenizer, {"text": "a", "id": None}).sample_id == "src:0"
    row = {"text": "a", "metadata": {"url": "u", "score": 1.5}}
    assert one_sample(tokenizer, row).metadata == {"url": "u", "score": 1.5}


def test_keep_text() -> None:
    tokenizer = byte_level(CHATML)
    assert one_sample(tokenizer, {"text": "abc"}, keep_text=True).text == "abc"
    both = {"prompt": "a", "completion": "b"}
    assert one_sample(tokenizer, both, keep_text=True).text == "ab"
    row = chat("a", "b")
    assert one_sample(tokenizer, row, keep_text=True).messages == row["messages"]
    assert one_sample(tokenizer, row).messages is None


@pytest.mark.parametrize(
    "row",
    [{"text": ""}, {"input_ids": []}, {"messages": []}, {"prompt": "", "completion": ""}],
)
def test_empty_rows_are_counted_and_give_no_sample(row: dict[str, Any]) -> None:
    made = builder(byte_level(CHATML, adds_bos=True))
    assert made.samples(0, row) == []
    assert made.counters.num_empty == 1
    assert made.counters.num_samples == 0


def test_policy_is_json_and_names_what_auto_became() -> None:
    tokenizer = byte_level(CHATML, adds_bos=True)
    policy = json.loads(json.dumps(builder(tokenizer).policy()))
    assert policy == {
        "add_bos": True,
        "bos_token_id": 0,
        "add_eos": True,
        "eos_token_id": 1,
        "chat_template_sha256": policy["chat_template_sha256"],
    }
    assert builder(byte_level()).policy()["chat_template_sha256"] is None
    assert supervised(tokenizer, one_sample(tokenizer, chat("a", "b"))) == ["b<|im_end|>"]
