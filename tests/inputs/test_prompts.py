"""Rows as prompts: what precedes an answer, and nothing of it supervised."""

from __future__ import annotations

from typing import Any

import pytest

from kdstore.errors import InputError
from kdstore.inputs import InputConfig
from kdstore.inputs.prompts import PromptBuilder
from tests.inputs.input_helpers import chat, one_sample
from tests.inputs.input_tokenizers import CHATML, byte_level

ASKED = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
QUESTION = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "42"}
TOOL = {"role": "tool", "content": "the answer"}


def builder(
    template: str | None = CHATML, *, adds_bos: bool = False, **options: Any
) -> PromptBuilder:
    return PromptBuilder(byte_level(template, adds_bos=adds_bos), InputConfig(**options), "src")


@pytest.mark.parametrize(
    ("row", "text", "kind"),
    [
        ({"prompt": "Answer: ", "completion": "42"}, "Answer: ", "user"),
        ({"prompt": "Answer: "}, "Answer: ", "user"),
        ({"text": "hello world"}, "hello world", "text"),
        ({"text": "hello", "completion": " world"}, "hello", "text"),
        (chat("What is it?"), ASKED, "user"),
        (chat("What is it?", "42"), ASKED, "user"),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, ASKED, "user"),
        ({"prompt": [QUESTION]}, ASKED, "user"),
        (
            chat("What is it?", "42", "and", "43", roles=("user", "assistant")),
            ASKED + "42<|im_end|>\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n",
            "user",
        ),
    ],
)  # fmt: skip
def test_prompts_end_where_the_teacher_begins(row: dict[str, Any], text: str, kind: str) -> None:
    made = builder(add_eos="always")
    (prompt,) = made.samples(0, row)
    assert made._tokenizer.decode(prompt.input_ids_T) == text
    (span,) = prompt.spans
    assert (span.start, span.end, span.kind) == (0, prompt.num_tokens, kind)
    assert not span.supervised


def test_an_answer_to_a_tool_is_asked_for_and_bos_is_added_to_texts_only() -> None:
    made = builder(adds_bos=True)
    bos = made._tokenizer.bos_token_id
    call = {"role": "assistant", "content": "calls"}
    (prompt,) = made.samples(0, {"messages": [QUESTION, call, TOOL]})
    text = made._tokenizer.decode(prompt.input_ids_T)
    assert text.endswith("tool\nthe answer<|im_end|>\n<|im_start|>assistant\n")
    assert bos not in prompt.input_ids_T
    (prompt,) = made.samples(1, {"text": "hello"})
    assert prompt.input_ids_T[0] == bos


def test_input_ids_end_before_what_labels_or_spans_supervise() -> None:
    ids, made = [5, 6, 7, 8], builder()
    span = {"start": 3, "end": 4, "kind": "assistant", "supervised": True}
    for row, count in (
        ({"input_ids": ids}, 4),
        ({"input_ids": ids, "labels": [-100] * 4}, 4),
        ({"input_ids": ids, "labels": [-100, -100, 7, 8]}, 2),
        ({"input_ids": ids, "spans": [span]}, 3),
    ):
        (prompt,) = made.samples(0, row)
        assert prompt.input_ids_T.tolist() == ids[:count]
    assert made.samples(0, {"input_ids": ids, "labels": ids}) == []
    assert made.counters.num_empty == 1


def test_long_prompts_are_not_split() -> None:
    (prompt,) = builder(max_length=4).samples(0, {"input_ids": list(range(9))})
    assert (prompt.sample_id, prompt.num_tokens) == ("src:0", 9)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"completion": "a"}, "expected: input_ids, or messages, or prompt, or text"),
        ({"prompt": 3}, "a prompt of the wrong type"),
        (chat("a", roles=("assistant",)), "got: no message but the assistant's"),
        (chat("a", roles=("system",)), "got: system"),
        ({"messages": []}, "no turn that the teacher could answer"),
        ({"prompt": ["a"]}, r"prompt\[0\]"),
    ],
)
def test_what_is_no_prompt_is_refused(row: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=found) as caught:
        builder().samples(7, row)
    assert "row 7 of src" in str(caught.value)


def test_a_template_that_drops_what_the_user_says_is_refused() -> None:
    part = "{% for p in m.content if p.type %}{{ p.text }}{% endfor %}"
    parts = f"{{% for m in messages %}}{part}{{% endfor %}}!"
    with pytest.raises(InputError, match="does not write what the user says last"):
        builder(parts).samples(0, chat("What is it?"))


def test_spans_of_input_ids_are_those_of_a_store() -> None:
    spans = [
        {"start": 0, "end": 2, "kind": "user", "supervised": False},
        {"start": 2, "end": 4, "kind": "assistant", "supervised": True},
    ]
    row = {"input_ids": [5, 6, 7, 8], "spans": spans, "metadata": '{"a": [1, null]}'}
    sample = one_sample(byte_level(), row)
    assert [vars(span) for span in sample.spans] == spans
    assert sample.metadata == {"a": [1, None]}
    ignoring = one_sample(byte_level(), {**row, "labels": [-100, -100, 7, -100]})
    assert ignoring.with_score_rule("supervised").runs == ((2, 3),)


@pytest.mark.parametrize(
    "spans",
    [
        "text",
        [1],
        [{"start": 0, "end": 1}],
        [{"start": 0, "end": 3, "kind": "user", "supervised": True}],
        [{"start": -1, "end": 1, "kind": "user", "supervised": True}],
        [{"start": 1, "end": 0, "kind": "user", "supervised": True}],
        [{"start": 0, "end": 1.0, "kind": "user", "supervised": True}],
        [{"start": 0, "end": 1, "kind": None, "supervised": True}],
        [{"start": 0, "end": 1, "kind": "user", "supervised": 1}],
        [{"start": 0, "end": 1, "kind": "user", "supervised": True, "label": "x"}],
    ],
)
def test_spans_that_are_none_are_refused(spans: Any) -> None:
    with pytest.raises(InputError, match="spans that are none"):
        one_sample(byte_level(), {"input_ids": [1, 2], "spans": spans})
