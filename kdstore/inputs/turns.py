"""Where an assistant's turn begins and ends in a rendered conversation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from kdstore.inputs.marks import Place, RewrittenError, mark_messages
from kdstore.inputs.messages import Conversation, Message, kind_of
from kdstore.inputs.template import CharRange, ChatTemplate, common_length


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
    text: str, chat: Conversation, blocks: list[Block], template: ChatTemplate
) -> Iterator[tuple[int, CharRange]]:
    """(message index, characters) of each assistant turn, in order; linear in the conversation.

    Raises RewrittenError for a message in several places and for one whose turn has no certain
    beginning or end.
    """
    position_of = {block.message: position for position, block in enumerate(blocks)}
    if len(position_of) < len(blocks):
        _refuse_scattered(chat.messages, blocks)
    cursor, following = 0, 0
    for index, message in enumerate(chat.messages):
        position = position_of.get(index)
        if position is not None:
            cursor, following = blocks[position].end, position + 1
        if kind_of(message["role"]) != "assistant":
            continue
        if position is not None:
            start = _header_end(text, blocks[position], template)
            turn = start, _end(text, blocks[position], chat, template)
        else:
            high = blocks[following].start if following < len(blocks) else len(text)
            turn = _silent(text, index, cursor, high, template)
        cursor = turn[1]
        yield index, turn


def _refuse_scattered(messages: list[Message], blocks: list[Block]) -> None:
    """Raises RewrittenError if parts of an assistant's message have others' between them."""
    seen = set()
    for block in blocks:
        if block.message in seen and kind_of(messages[block.message]["role"]) == "assistant":
            raise RewrittenError(block.message, "does not keep it in one place")
        seen.add(block.message)


def _header_end(text: str, block: Block, template: ChatTemplate) -> int:
    """End of the header before a message; its first text where the template has none."""
    for header in template.headers:
        found = text.rfind(header, block.low, block.start)
        if found >= 0:
            return found + len(header)
    return block.start


def _end(text: str, block: Block, chat: Conversation, template: ChatTemplate) -> int:
    """End of the end-of-turn token of a message with texts."""
    if chat.messages[block.message].get("tool_calls"):
        return _end_of_calls(text, block, chat, template)
    trail = block.places[-1].mark.trail
    end = block.end + (len(trail) if text.startswith(trail, block.end) else 0)
    match = template.specials.search(text, end, block.high)
    if match is None:
        return end
    gap = text[end : match.start()]
    # A special token behind white space may as well open the next turn.
    if gap and (gap.strip() or match.group() not in template.closers):
        return end
    return _whole_ending(text, match.start(), template) or match.end()


def _end_of_calls(text: str, block: Block, chat: Conversation, template: ChatTemplate) -> int:
    """End of a turn with tool calls, whose syntax is the template's own.

    The message is rendered once more as if it were the last: what both have in common behind the
    last text still belongs to the turn. Raises RewrittenError if no special token ends it.
    """
    marked, _ = mark_messages([chat.messages[block.message]])
    after = template.after_calls(marked[0], chat.tools)
    shared = common_length(after, text[block.end : block.high])
    limit = block.end + shared
    if end := _first_ending(text, block.end, limit, template):
        return end
    specials = [match.end() for match in template.specials.finditer(text, block.end, limit)]
    if shared == len(after):  # all of it; GLM ends it with what begins the next turn
        end = limit - len(after) + len(after.rstrip())
        if end in specials:
            return end
        if following := template.specials.match(text, limit):
            return following.end()
    elif specials:
        return specials[-1]
    raise RewrittenError(block.message, "does not end a tool call with a special token")


def _silent(text: str, index: int, low: int, high: int, template: ChatTemplate) -> CharRange:
    """The turn of a message without any text: what follows the next header, if it has an end."""
    for header in reversed(template.headers):
        found = text.find(header, low, high)
        if found >= 0:
            longer = next(form for form in template.headers if text.startswith(form, found))
            start = found + len(longer)
            return start, _first_ending(text, start, high, template) or start
    raise RewrittenError(index, "does not show where its empty turn is")


def _first_ending(text: str, low: int, high: int, template: ChatTemplate) -> int | None:
    """End of the first thing that ends turns, None if there is none."""
    starts = [text.find(ending, low, high) for ending in template.endings]
    found = min((start for start in starts if start >= 0), default=None)
    return None if found is None else _whole_ending(text, found, template)


def _whole_ending(text: str, start: int, template: ChatTemplate) -> int | None:
    """End of the longest ending that begins here: some templates end turns with several tokens."""
    forms = (form for form in template.endings if text.startswith(form, start))
    return next((start + len(form) for form in forms), None)
