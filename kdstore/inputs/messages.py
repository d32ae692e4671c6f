"""Conversations in one shape: a list of dicts with a role and a string content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdstore.errors import InputError

Message = dict[str, Any]

# Other names in use for the kinds of sample.Span; a role that is not listed is its own kind.
_KINDS = {"developer": "system", "model": "assistant", "function": "tool", "ipython": "tool"}


@dataclass(frozen=True)
class Conversation:
    """Messages and tools; assistant turns before message ``first_supervised`` do not count.

    ``where`` is the row's place in words.
    """

    messages: list[Message]
    where: str
    tools: list[dict[str, Any]] | None = None
    first_supervised: int = 0


def kind_of(role: str) -> str:
    """The span kind of a role: system, user, assistant, tool, or the role itself."""
    return _KINDS.get(role, role)


def read_messages(value: Any, name: str, where: str) -> list[Message]:
    """Messages with a string ``content``, as chat templates take them.

    A content of text parts becomes the concatenation of their texts, since a template for text
    takes strings; an assistant's missing content becomes "". Keys with null are left out: Parquet
    fills a key that one message has with null in all others. Raises InputError, naming the message,
    for anything else.
    """
    if not isinstance(value, list):
        raise InputError(
            f"{name} is not a list of messages",
            where=where,
            expected='[{"role": ..., "content": ...}, ...]',
            got=f"{type(value).__name__}: {value!r:.60}",
        )
    return [_read_message(item, f"{where}, {name}[{i}]") for i, item in enumerate(value)]


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Tool schemas: a list of dicts, or the same as JSON text. Raises InputError otherwise."""
    if value is None:
        return None
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError("tools is not JSON", where=where, got=error) from error
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tools or None
    raise InputError(
        "tools is not a list of schemas",
        where=where,
        expected="a list of JSON schemas",
        got=f"{type(tools).__name__}: {tools!r:.60}",
    )


def _read_message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        raise InputError(
            "not a message",
            where=where,
            expected='{"role": ..., "content": ...}',
            got=f"{type(item).__name__}: {item!r:.60}",
            todo="name the speaker `role` and the text `content`",
        )
    message = {key: value for key, value in item.items() if value is not None}
    content = message.get("content")
    if content is None and kind_of(message["role"]) == "assistant":
        content = ""
    message["content"] = _text_of(content, where)
    return message


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_text_of_part(part, where) for part in content)
    raise InputError(
        "a message without text",
        where=where,
        expected="content as a string or a list of text parts",
        got=f"{type(content).__name__}: {content!r:.60}",
    )


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise InputError(
        "a part of a message that is not text",
        where=where,
        expected='{"type": "text", "text": ...}',
        got=f"{part!r:.80}",
        todo="kdstore distils text; leave out images and audio",
    )
