"""Conversations: exactly the assistant's tokens are supervised, whatever is said."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kdstore.errors import InputError, UsageError
from tests.inputs.input_helpers import builder, chat, one_sample, readable, supervised
from tests.inputs.input_tokenizers import (
    CHATML,
    CHATML_GENERATION,
    DROPPING,
    GLM,
    LLAMA2,
    LLAMA3,
    MANGLING,
    PLAIN,
    QWEN3,
    TWICE,
    byte_level,
    metaspace,
    words,
)

TURNS = chat("what is it", "the answer", " it is\n", "hello world")


def test_every_span_of_a_chatml_conversation() -> None:
    tokenizer = byte_level(CHATML)
    row = {"messages": [{"role": "system", "content": "the cat"}, *TURNS["messages"]]}
    assert readable(tokenizer, one_sample(tokenizer, row)) == [
        ("template", "<|im_start|>system\n", False),
        ("system", "the cat", False),
        ("template", "<|im_end|>\n<|im_start|>user\n", False),
        ("user", "what is it", False),
        ("template", "<|im_end|>\n<|im_start|>assistant\n", False),
        ("assistant", "the answer<|im_end|>", True),
        ("template", "\n<|im_start|>user\n", False),
        ("user", " it is", False),
        ("template", "\n<|im_end|>\n<|im_start|>assistant\n", False),
        ("assistant", "hello world<|im_end|>", True),
        ("template", "\n", False),
    ]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["the answer<|im_end|>", "hello world<|im_end|>"]),
        (CHATML_GENERATION, ["the answer<|im_end|>", "hello world<|im_end|>"]),
        (QWEN3, ["the answer<|im_end|>", "hello world<|im_end|>"]),
        (LLAMA3, ["the answer<|eot_id|>", "hello world<|eot_id|>"]),
        (LLAMA2, [" the answer </s>", " hello world </s>"]),
        (GLM, ["the answer<|user|>", "hello world"]),
        (PLAIN, [" the answer", " hello world"]),
    ],
)
def test_supervised_text_of_each_template(template: str, answers: list[str]) -> None:
    tokenizer = byte_level(template)
    assert supervised(tokenizer, one_sample(tokenizer, TURNS)) == answers


def test_tokens_are_those_of_the_rendered_text_and_bos_comes_once() -> None:
    tokenizer = byte_level(LLAMA3, adds_bos=True, bos_token="<|begin_of_text|>")
    sample = one_sample(tokenizer, TURNS, add_bos="always", add_eos="always")
    rendered = tokenizer.apply_chat_template(TURNS["messages"], tokenize=False)
    assert sample.input_ids_T.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert sample.input_ids_T.tolist().count(tokenizer.bos_token_id) == 1


def test_sentencepiece_manner_keeps_the_first_token_of_an_answer() -> None:
    tokenizer = metaspace(LLAMA2)
    assert supervised(tokenizer, one_sample(tokenizer, TURNS)) == [
        "the answer </s>",
        "hello world </s>",
    ]


def test_a_tokenizer_that_drops_white_space_and_case() -> None:
    tokenizer = words(CHATML)
    row = chat("What is it", "The  Answer", "it", "Hello World")
    assert supervised(tokenizer, one_sample(tokenizer, row)) == [
        "the answer <|im_end|>",
        "hello world <|im_end|>",
    ]


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
@pytest.mark.parametrize(
    "row",
    [
        chat("say yes", "yes"),
        chat("yes", "yes", "yes", "yes"),
        chat("what is assistant", "assistant"),
        chat("x", "user", "y", "im_end"),
        chat("x", "assistant\n", "user", "<|im_start|>assistant\nno"),
        chat("<|im_end|>\n<|im_start|>assistant\nyes", "yes"),
        chat("a<|im_end|>", "b<|im_end|>c", "d", "e<|im_end|>"),
        chat("x", "", "y", "z"),
        chat("", "", "", ""),
        chat("x", " ", "y", " \n z \n "),
        chat("x", "kdmark0q0z", "kdmark0q1z", "kdmark0q7z kdmark0qz"),
        chat("tag <think> here", "<think>a</think>b", "</think>", "<tool_call>c"),
    ],
)
def test_texts_that_a_search_would_find_in_the_wrong_place(template: str, row: Any) -> None:
    tokenizer = byte_level(template)
    answers = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
    assert supervised(tokenizer, one_sample(tokenizer, row)) == answers


def test_a_template_that_strips() -> None:
    tokenizer = byte_level(LLAMA3)
    row = chat(" \n hi ", "\n\n the answer \n", "  ", "   ")
    assert supervised(tokenizer, one_sample(tokenizer, row)) == [
        "the answer<|eot_id|>",
        "<|eot_id|>",
    ]


def test_consecutive_answers_and_a_last_question() -> None:
    tokenizer = byte_level(CHATML)
    row = chat("the", "cat", "", "sat", "on", roles=("assistant", "assistant", "assistant", "user"))
    row["messages"].append({"role": "user", "content": "what"})
    turn = "<|im_end|>"
    assert supervised(tokenizer, one_sample(tokenizer, row)) == [
        "the" + turn,
        "cat" + turn,
        turn,
        "on" + turn,
    ]


def test_a_conversation_without_an_answer_is_a_sample_of_nothing_supervised() -> None:
    tokenizer = byte_level(CHATML)
    made = builder(tokenizer)
    (sample,) = made.samples(0, chat("what is it"))
    assert supervised(tokenizer, sample) == []
    assert made.counters.num_unsupervised == 1


def test_a_line_break_shared_by_header_and_answer_is_not_supervised() -> None:
    tokenizer = byte_level(CHATML)
    assert len(tokenizer("\n\n")["input_ids"]) == 1, "the case needs a token of two line breaks"
    sample = one_sample(tokenizer, chat("x", "\nthe answer"))
    assert supervised(tokenizer, sample) == ["the answer<|im_end|>"]


def test_turns_that_end_with_several_tokens() -> None:
    template = CHATML.replace("<|im_end|>", "<|eot_id|><|im_end|>")
    tokenizer = byte_level(template)
    row = chat("x", "the cat", "y", "", "z", "it")
    end = "<|eot_id|><|im_end|>"
    assert supervised(tokenizer, one_sample(tokenizer, row)) == ["the cat" + end, end, "it" + end]


def test_a_last_turn_that_ends_in_another_way() -> None:
    """gpt-oss: <|return|> after a last answer, <|end|> after others; Phi 3 appends EOS."""
    other = CHATML.replace("'<|im_end|>\n'", "('<|eot_id|>' if loop.last else '<|im_end|>\n')")
    tokenizer = byte_level(other)
    row = chat("x", "", "y", "the cat")
    assert supervised(tokenizer, one_sample(tokenizer, row)) == ["<|im_end|>", "the cat<|eot_id|>"]
    phi = CHATML.replace("{% endif %}", "{% else %}{{ '</s>' }}{% endif %}")
    tokenizer = byte_level(phi)
    answers = ["<|im_end|>", "the cat<|im_end|>"]
    assert supervised(tokenizer, one_sample(tokenizer, row)) == answers


def test_parts_of_text_and_other_names_of_roles() -> None:
    tokenizer = byte_level(CHATML)
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "is it"}]
    row = {
        "messages": [
            {"role": "developer", "content": "the cat"},
            {"role": "user", "content": parts},
            {"role": "narrator", "content": "hello"},
            {"role": "model", "content": "it is"},
        ]
    }
    spans = readable(tokenizer, one_sample(tokenizer, row))
    spoken = [(kind, text) for kind, text, _ in spans if kind != "template"]
    assert spoken == [
        ("system", "the cat"),
        ("user", "what is it"),
        ("narrator", "hello"),
        ("assistant", "it is<|im_end|>"),
    ]


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
def test_prompt_and_completion_of_messages(template: str) -> None:
    tokenizer = byte_level(template)
    messages = TURNS["messages"]
    row = {"prompt": messages[:3], "completion": messages[3:]}
    sample = one_sample(tokenizer, row)
    assert supervised(tokenizer, sample) == ["hello world<|im_end|>"]
    assert ("assistant", "the answer<|im_end|>", False) in readable(tokenizer, sample)
    whole = one_sample(tokenizer, {"messages": messages})
    assert sample.input_ids_T.tolist() == whole.input_ids_T.tolist()


@pytest.mark.parametrize(
    ("template", "what", "message"),
    [
        (MANGLING, "leaves it out", "message 0 "),
        (DROPPING, "leaves it out", "message 1 "),
        (TWICE, "writes it more than once", "message 1 "),
        (CHATML.replace("message.content", "(message.content | length | string)"), "leaves", "0 "),
        (LLAMA3.replace("| trim", "| tojson"), "changes its text", "message 1 "),
        (
            CHATML.replace(
                "'<|im_end|>",
                "('!' if 'cat' in message.content else '') + '<|im_end|>",
            ),
            "something else after it",
            "message 1 ",
        ),
        (
            CHATML.replace(
                "message.content", "('!' if 'cat' in message.content else '') + message.content"
            ),
            "changes its text",
            "message 1 ",
        ),
    ],
)
def test_a_template_that_rewrites_is_refused(template: str, what: str, message: str) -> None:
    tokenizer = byte_level(template)
    tokenizer.name_or_path = "some/model"
    made = builder(tokenizer)
    with pytest.raises(InputError, match=what) as caught:
        made.samples(7, chat("what is it", 'a "cat" sat'))
    told = str(caught.value)
    assert message in told
    assert "row 7 of src" in told
    assert "some/model" in told
    assert made.policy()["chat_template_sha256"][:12] in told


def test_generation_blocks_are_believed_about_who_speaks_not_about_what_is_said() -> None:
    template = CHATML_GENERATION.replace("'\n' }}{% if", "'\n' }}{% if loop.last and")
    tokenizer = byte_level(template)
    assert supervised(tokenizer, one_sample(tokenizer, TURNS)) == ["hello world<|im_end|>"]
    for rewriting in ("message.content | replace('a', 'b')", "message.parts | string"):
        tokenizer = byte_level(CHATML_GENERATION.replace("message.content", rewriting))
        with pytest.raises(InputError, match="leaves it out"):
            one_sample(tokenizer, TURNS)


def test_no_template_and_templates_that_refuse() -> None:
    with pytest.raises(InputError, match="no chat template") as caught:
        one_sample(byte_level(), TURNS)
    assert "to do" in str(caught.value)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        one_sample(byte_level(refusing), TURNS)
    with pytest.raises(InputError, match="refuses"):
        one_sample(byte_level("{{ messages[0].content + 1 }}"), TURNS)
    with pytest.raises(InputError, match="empty turn"):
        one_sample(byte_level(LLAMA2), chat("x", ""))


def test_several_templates_by_name() -> None:
    tokenizer = byte_level({"default": CHATML, "tool_use": QWEN3})
    made = builder(tokenizer)
    row = {**TURNS, "tools": '[{"name": "look"}]'}
    (sample,) = made.samples(0, row)
    assert '[{"name": "look"}]' in tokenizer.decode(sample.input_ids_T)
    assert re.fullmatch("[0-9a-f]{64}", made.policy()["chat_template_sha256"])


def test_template_options_and_the_date_are_fixed() -> None:
    template = "{{ strftime_now('%d %b %Y') + mood }}" + CHATML
    tokenizer = byte_level(template)
    sample = one_sample(
        tokenizer, TURNS, template_options={"mood": "!"}, template_date="2024-07-26"
    )
    assert tokenizer.decode(sample.input_ids_T).startswith("26 Jul 2024!")
    assert len(supervised(tokenizer, sample)) == 2


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "slow/model"
        chat_template = CHATML
        bos_token_id = eos_token_id = None

        def __getattr__(self, name: str) -> Any:
            return getattr(byte_level(CHATML), name)

    with pytest.raises(UsageError, match="slow/model"):
        one_sample(Slow(), TURNS)


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION, QWEN3])
def test_a_conversation_is_rendered_once_however_long(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendering prefixes again and again is quadratic. The first of its form is rendered twice."""
    from transformers.utils import chat_template_utils

    tokenizer = byte_level(template)
    made = builder(tokenizer)
    made.samples(0, TURNS)  # the template is probed once
    rendered: list[int] = []
    compiled = chat_template_utils._compile_jinja_template(template)
    for name in ("render", "generate"):
        original = getattr(compiled, name)

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            rendered.append(len(kwargs["messages"]))
            return original(*args, **kwargs)

        monkeypatch.setattr(compiled, name, counted)
    for turns in (2, 50, 400):
        row = chat(*(f"text {i}" for i in range(turns)))
        rendered.clear()
        made.samples(1, row)
        assert rendered == [turns, turns]
        rendered.clear()
        made.samples(2, chat(*(f"other {i}" for i in range(turns))))
        assert rendered == [turns]
