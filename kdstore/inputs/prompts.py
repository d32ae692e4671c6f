"""PromptBuilder: rows become prompts, for a teacher to go on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from kdstore.errors import InputError
from kdstore.inputs.base import Row
from kdstore.inputs.config import InputConfig
from kdstore.inputs.messages import Message, kind_of, read_messages, read_tools
from kdstore.inputs.rows import Read, SampleBuilder
from kdstore.inputs.tokenize import EMPTY, Encoded, encode_ids
from kdstore.sample import Span

_ANSWERED = ("user", "tool")


class PromptBuilder(SampleBuilder):
    """Turns rows into samples without anything supervised: what precedes an answer.

    ``input_ids``, up to the first that ``labels`` or ``spans`` supervise; ``messages``, without the
    assistant's at the end, and the template's generation prompt; ``prompt``, a string or messages;
    ``text``. A ``completion`` is not read. BOS is added as to training texts, EOS never, and
    nothing is split.
    """

    usable = (("input_ids",), ("messages",), ("prompt",), ("text",))

    def __init__(
        self,
        tokenizer: Any,
        config: InputConfig,
        source_name: str,
        *,
        locate: Callable[[int], str] | None = None,
    ) -> None:
        plain = replace(config, max_length=None, add_eos="never", keep_text=False)
        super().__init__(tokenizer, plain, source_name, locate=locate)
        self._tokenizer = tokenizer

    def _read_input_ids(self, row: Row, where: str) -> Read:
        encoded = encode_ids(row, where)
        marked = any(row.get(name) is not None for name in ("labels", "spans"))
        answers = [span.start for span in encoded.spans if span.supervised and marked]
        return _prompt(encoded.ids_T[: min(answers, default=None)], "text")

    def _read_messages(self, row: Row, where: str) -> Read:
        return self._asked(read_messages(row["messages"], "messages", where), row, where)

    def _read_prompt(self, row: Row, where: str) -> Read:
        if isinstance(row["prompt"], list):
            return self._asked(read_messages(row["prompt"], "prompt", where), row, where)
        if isinstance(row["prompt"], str):
            return _prompt(self._text.text(row["prompt"]).ids_T, "user")
        raise InputError(
            "a prompt of the wrong type",
            where=f"{where}, prompt",
            expected="a string or a list of messages",
            got=f"{type(row['prompt']).__name__}: {row['prompt']!r:.60}",
        )

    def _read_text(self, row: Row, where: str) -> Read:
        return _prompt(super()._read_text(row, where).encoded.ids_T, "text")

    def _asked(self, messages: list[Message], row: Row, where: str) -> Read:
        while messages and kind_of(messages[-1]["role"]) == "assistant":
            messages = messages[:-1]
        if not messages or kind_of(messages[-1]["role"]) not in _ANSWERED:
            raise InputError(
                "no turn that the teacher could answer",
                where=where,
                expected=f"messages up to one of {' or '.join(_ANSWERED)}",
                got=messages[-1]["role"] if messages else "no message but the assistant's",
            )
        tools = read_tools(row.get("tools"), where)
        text = self._chat.template.render(messages, tools, where, prompt=True)
        _check_rendered(messages[-1], text, f"{where}, {self._chat.template}")
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return _prompt(ids, "user")


def _check_rendered(last: Message, text: str, where: str) -> None:
    """Templates for images and text drop contents that are strings without a word."""
    if kind_of(last["role"]) == "user" and last["content"].strip() not in text:
        raise InputError(
            "the chat template does not write what the user says last",
            where=where,
            expected=f"{last['content']!r:.80} in the prompt",
            got=f"{text!r:.160}",
            todo="use a template for text, or render the prompt yourself and give input_ids",
        )


def _prompt(ids: Any, kind: str) -> Read:
    ids_T = np.asarray(ids, dtype=np.int32)
    if not len(ids_T):
        return Read(EMPTY)
    return Read(Encoded(ids_T, (Span(0, len(ids_T), kind, supervised=False),)))
