"""Where a chat template puts what the messages say.

Searching the rendered text is not enough: an answer "assistant" is also in the header before it,
and a question may quote the answer. So the template is rendered a second time with a unique mark in
place of every text. What lies between the marks is the template's own, and the real rendering must
be those pieces with the real texts in between, or it is refused. That makes two renderings of a
conversation, however long, and one where its form was seen before.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kdstore.inputs.messages import Message, kind_of

_MARK = re.compile(r"kdmark0q(\d+)z")
# Templates look for these in a content and act on them, so the marked content keeps them.
_TAGS = re.compile(r"(</?(?:think|tool_call|tool_response)>)")
_DROPPABLE = ("reasoning", "aside")
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Mark:
    """A text of message ``message``: its core without the white space around it.

    White space stays in the marked content, where the template strips it as it strips the real one.
    ``role`` is what the text is: content, call (of a tool), reasoning (which templates drop from
    earlier turns) or aside (a content beside calls, which some drop, and some take for reasoning).
    ``trail`` is the white space that followed the core.
    """

    message: int
    core: str
    trail: str
    role: str
    assistant: bool

    @property
    def forms(self) -> tuple[str, ...]:
        """How the core may be written: as it is, or inside a JSON string.

        An assistant's own words only as they are.
        """
        if self.assistant and self.role != "call":
            return (self.core,)
        escaped = (json.dumps(self.core, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True))
        return tuple(dict.fromkeys((self.core, *escaped)))


@dataclass(frozen=True)
class Place:
    """Characters ``[start, end)`` of the rendered text that hold a mark's core."""

    mark: Mark
    start: int
    end: int


@dataclass(frozen=True)
class Skeleton:
    """The template's pieces around numbered marks: one piece more than marks."""

    pieces: tuple[str, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, rendered: str) -> Skeleton:
        """The skeleton of a rendering of marked messages."""
        parts = _MARK.split(rendered)
        return cls(tuple(parts[0::2]), tuple(int(number) for number in parts[1::2]))


class RewrittenError(Exception):
    """The template does something else with message ``message`` than put it somewhere."""

    def __init__(self, message: int, what: str) -> None:
        super().__init__(what)
        self.message = message


def mark_messages(messages: Sequence[Message]) -> tuple[list[Message], list[Mark]]:
    """The messages with marks for texts, and the marks in the order of their numbers.

    Texts are contents, reasoning and the names and arguments of tool calls. White space alone and
    empty texts stay, since templates ask whether there is a content.
    """
    marks: list[Mark] = []
    return [_Marker(i, message, marks).marked() for i, message in enumerate(messages)], marks


def locate(text: str, skeleton: Skeleton, marks: Sequence[Mark]) -> list[Place]:
    """The place of every mark that the template shows, in text order; linear in the text.

    Raises RewrittenError if a content or call is missing, something of the assistant's is there
    twice, or the text is not the skeleton filled in.
    """
    shown = Counter(skeleton.numbers)
    for number, mark in enumerate(marks):
        if not shown[number] and mark.role not in _DROPPABLE:
            raise RewrittenError(mark.message, "leaves it out")
        if shown[number] > 1 and mark.assistant and mark.role != "call":
            raise RewrittenError(mark.message, "writes it more than once")
    first = {number: i for i, number in reversed(list(enumerate(skeleton.numbers)))}
    return [
        place
        for i, place in enumerate(_filled_in(text, skeleton, marks))
        # Gemma names the called function again beside its result: that is not the assistant's.
        if place.mark.role != "call" or first[skeleton.numbers[i]] == i
    ]


def _filled_in(text: str, skeleton: Skeleton, marks: Sequence[Mark]) -> Iterator[Place]:
    """The places of the skeleton's marks, one each. Raises RewrittenError if the text differs."""
    position, owner = 0, 0
    for piece, number in zip(skeleton.pieces, skeleton.numbers, strict=False):
        owner = marks[number].message
        if not text.startswith(piece, position):
            raise RewrittenError(owner, "writes something else before it")
        place = _place(text, position + len(piece), marks[number])
        position = place.end
        yield place
    if text[position:] != skeleton.pieces[-1]:
        raise RewrittenError(owner, "writes something else after it")


def _place(text: str, start: int, mark: Mark) -> Place:
    for form in mark.forms:
        if text.startswith(form, start):
            return Place(mark, start, start + len(form))
    raise RewrittenError(mark.message, "changes its text")


class _Marker:
    """Marks one message."""

    def __init__(self, index: int, message: Message, marks: list[Mark]) -> None:
        self._index = index
        self._message = message
        self._marks = marks
        self._assistant = kind_of(message["role"]) == "assistant"

    def marked(self) -> Message:
        marked = dict(self._message)
        marked["content"] = self._content(marked["content"])
        for name in _REASONING_FIELDS:
            if isinstance(marked.get(name), str):
                marked[name] = self._mark(marked[name], "reasoning")
        if isinstance(marked.get("tool_calls"), list):
            marked["tool_calls"] = [self._call(call) for call in marked["tool_calls"]]
        return marked

    def _content(self, content: str) -> str:
        runs = _TAGS.split(content)
        last_think = max((i for i, run in enumerate(runs) if run == "</think>"), default=-1)
        role = "aside" if self._assistant and self._message.get("tool_calls") else "content"
        for i in range(0, len(runs), 2):
            thought = self._assistant and i < last_think
            runs[i] = self._mark(runs[i], "reasoning" if thought else role)
        return "".join(runs)

    def _call(self, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        marked = dict(call)
        if "function" in marked:
            marked["function"] = self._call(marked["function"])
        for name in ("name", "arguments"):
            if name in marked:
                marked[name] = self._strings(marked[name])
        return marked

    def _strings(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._mark(value, "call")
        if isinstance(value, dict):
            return {key: self._strings(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._strings(item) for item in value]
        return value

    def _mark(self, text: str, role: str) -> str:
        core = text.strip()
        if not core:
            return text
        lead, _, trail = text.partition(core)
        number = len(self._marks)
        self._marks.append(Mark(self._index, core, trail, role, self._assistant))
        return f"{lead}kdmark0q{number}z{trail}"
