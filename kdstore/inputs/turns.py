"""Where an assistant's turn begins and ends in a rendered conversation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from kdstore.inputs.marks import Place, RewrittenError
from kdstore.inputs.messages import Message, kind_of
from kdstore.inputs.template import CharRange, ChatTemplate


@dataclass(frozen=True)
class Block:
    """Consecutive places of one message, between its neighbours' ends ``low`` and ``high``."""

    message: int
    places: tuple[Place, ...]
    low: int
    high: int

    @property
    def start(self) -> int:
        """First character of the message's texts."""
        return self.places[0].start

    @property
    def end(self) -> int:
        """One past the last character, white space after it included where it was kept."""
        return self.places[-1].end


def blocks_of(text: str, places: list[Place]) -> list[Block]:
    """What each message says, in text order; a message that is written twice has two blocks."""
    groups = itertools.groupby(places, key=lambda place: place.mark.message)
    runs = [(message, tuple(group)) for message, group in groups]
    lows = [0, *(run[-1].end for _, run in runs[:-1])]
    highs = [*(run[0].start for _, run in runs[1:]), len(text)]
    return [
        Block(message, run, low, high)
        for (message, run), low, high in zip(runs, lows, highs, strict=False)
    ]


def assistant_turns(
    text: str, messages: list[Message], blocks: list[Block], template: ChatTemplate
) -> Iterator[tuple[int, CharRange]]:
    """(message index, characters) of each assistant turn, in order; linear in the conversation.

    Raises RewrittenError for a message that is written twice and for one without any text whose
    turn cannot be found.
    """
    position_of: dict[int, int] = {}
    repeated = set()
    for position, block in enumerate(blocks):
        if position_of.setdefault(block.message, position) != position:
            repeated.add(block.message)
    cursor, following = 0, 0
    for index, message in enumerate(messages):
        is_assistant = kind_of(message["role"]) == "assistant"
        if is_assistant and index in repeated:
            raise RewrittenError(index, "writes it more than once")
        if index in position_of:
            block = blocks[position_of[index]]
            cursor, following = block.end, position_of[index] + 1
        if not is_assistant:
            continue
        if index in position_of:
            turn = _spoken(text, block, template, calls=bool(message.get("tool_calls")))
        else:
            high = blocks[following].start if following < len(blocks) else len(text)
            turn = _silent(text, index, cursor, high, template)
        cursor = turn[1]
        yield index, turn


def _spoken(text: str, block: Block, template: ChatTemplate, *, calls: bool) -> CharRange:
    """From the end of the header before the message to the end of its end-of-turn token."""
    start = block.start
    for header in template.headers:
        found = text.rfind(header, block.low, block.start)
        if found >= 0:
            start = found + len(header)
            break
    trail = block.places[-1].mark.trail
    end = block.end + (len(trail) if text.startswith(trail, block.end) else 0)
    closed = _closed(text, end, block.high, template, anywhere=calls)
    if calls and closed is None:
        raise RewrittenError(block.message, "does not end a tool call with a special token")
    return start, end if closed is None else closed


def _silent(text: str, index: int, low: int, high: int, template: ChatTemplate) -> CharRange:
    """The turn of a message without any text: what follows the next header."""
    for header in reversed(template.headers):
        found = text.find(header, low, high)
        if found >= 0:
            longer = next(form for form in template.headers if text.startswith(form, found))
            start = found + len(longer)
            return start, _closed(text, start, high, template, anywhere=True) or start
    raise RewrittenError(index, "does not show where its empty turn is")


def _closed(
    text: str, end: int, high: int, template: ChatTemplate, *, anywhere: bool
) -> int | None:
    """End of the end-of-turn token that closes a turn at ``end``, None if none does.

    That is a special token right behind; after white space only one known to end turns, since
    it may as well open the next turn; behind a tool call, whose syntax is the template's, any.
    """
    match = template.specials.search(text, end, high)
    if match is None:
        return None
    gap = text[end : match.start()]
    known = not gap.strip() and match.group() in template.closers
    return match.end() if not gap or known or anywhere else None
