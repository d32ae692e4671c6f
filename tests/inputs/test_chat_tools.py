"""Thoughts and tool calls are the assistant's words, tool results are not."""

from __future__ import annotations

import pytest

from kdstore.errors import InputError
from tests.inputs.input_helpers import chat, one_sample, readable, supervised
from tests.inputs.input_tokenizers import (
    CHATML,
    GLM,
    PLAIN,
    QWEN3,
    byte_level,
)


def test_thoughts_and_tool_calls() -> None:
    tokenizer = byte_level(QWEN3)
    call = {"name": "look", "arguments": {"q": 'a "cat"\n é', "n": 3, "deep": [{"x": "y"}]}}
    row = {
        "tools": [{"type": "function", "function": {"name": "look"}}],
        "messages": [
            {"role": "user", "content": "what is it"},
            {"role": "assistant", "content": "<think>\nhm the answer\n</think>\n\nthe answer"},
            {"role": "user", "content": "and the cat"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "look up",
                "tool_calls": [{"type": "function", "function": call}],
            },
            {"role": "tool", "content": "sat <|im_end|>", "tool_calls": None},
            {"role": "assistant", "content": "<think>\nso\n</think>\n\nit sat"},
        ],
    }
    spans = readable(tokenizer, one_sample(tokenizer, row))
    assert supervised(tokenizer, one_sample(tokenizer, row)) == [
        "the answer<|im_end|>",
        '<think>\nlook up\n</think>\n\n\n<tool_call>\n{"name": "look", "arguments": {"q": '
        '"a \\"cat\\"\\n é", "n": 3, "deep": [{"x": "y"}]}}\n</tool_call><|im_end|>',
        "<think>\nso\n</think>\n\nit sat<|im_end|>",
    ]
    assert ("tool", "sat <|im_end|>", False) in spans
    assert [text for kind, text, _ in spans if kind == "reasoning"] == ["look up", "so"]
    assert "hm" not in tokenizer.decode(one_sample(tokenizer, row).input_ids_T)


def test_a_tool_result_that_the_template_writes_as_json() -> None:
    template = CHATML.replace(
        "message.content +",
        "(message.content | tojson if message.role == 'tool' else message.content) +",
    )
    tokenizer = byte_level(template)
    row = chat("q", 'a "b"', 'line\n"a"\\', "it", roles=("user", "assistant", "tool", "assistant"))
    sample = one_sample(tokenizer, row)
    assert supervised(tokenizer, sample) == ['a "b"<|im_end|>', "it<|im_end|>"]
    kinds = {kind: text for kind, text, _ in readable(tokenizer, sample)}
    assert kinds["tool"] == 'line\\n\\"a\\"\\\\'


CALL = {"type": "function", "function": {"name": "look", "arguments": {"q": "cat", "n": 3}}}
CALLED = [
    {"role": "user", "content": "what"},
    {"role": "assistant", "content": "wait", "tool_calls": [CALL]},
    {"role": "tool", "content": "sat"},
    {"role": "assistant", "content": "it sat"},
]
GLM_CALLS = GLM.replace(  # the next turn's token ends this one; the content beside it is dropped
    "message.content",
    "((message.tool_calls[0].function.arguments | tojson + message.tool_calls[0].function.name"
    " + '\n') if message.tool_calls else message.content)",
)
GEMMA_CALLS = (  # special tokens inside the call, no end of turn, the result names the function
    "{% for message in messages %}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<|im_start|>assistant\n' + call.function.name + '[TOOL_CALLS]' + call.function.arguments.q"
    " + '[TOOL_CALLS]3<|eot_id|>' }}"
    "{% else %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'tool' %}{{ messages[1].tool_calls[0].function.name + ':' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (GLM_CALLS, ['{"q": "cat", "n": 3}look\n<|tool|>', "it sat"]),
        (GEMMA_CALLS, ["look[TOOL_CALLS]cat[TOOL_CALLS]3<|eot_id|>", "it sat<|im_end|>"]),
    ],
)
def test_where_a_tool_call_ends(template: str, answers: list[str]) -> None:
    tokenizer = byte_level(template, additional=["<|tool|>"])
    sample = one_sample(tokenizer, {"messages": CALLED})
    assert supervised(tokenizer, sample) == answers
    assert ("tool", "sat", False) in readable(tokenizer, sample)


def test_a_tool_call_that_no_special_token_ends() -> None:
    template = PLAIN.replace(
        "message.content +",
        "message.content + (message.tool_calls[0].name if message.tool_calls else '') +",
    )
    row = chat("x", "y")
    row["messages"][1]["tool_calls"] = [{"name": "look", "arguments": {}}]
    with pytest.raises(InputError, match="does not end a tool call"):
        one_sample(byte_level(template), row)


def test_a_call_that_the_template_leaves_out() -> None:
    with pytest.raises(InputError, match=r"message 1 .*leaves it out"):
        one_sample(byte_level(CHATML), {"messages": CALLED})


def test_thinking_headers() -> None:
    """A generation prompt that opens the thought: that opening is given, not generated."""
    template = QWEN3.replace(
        "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    )
    tokenizer = byte_level(template)
    row = chat("x", "<think>\nold\n</think>\n\nold", "y", "<think>\nnew\n</think>\n\nnew")
    assert supervised(tokenizer, one_sample(tokenizer, row)) == [
        "old<|im_end|>",
        "new\n</think>\n\nnew<|im_end|>",
    ]
