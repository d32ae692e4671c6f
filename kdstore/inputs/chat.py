"""Conversations as tokens: what the assistant said is supervised, the rest is annotated.

Supervised is what the model itself would have to generate: everything of an assistant's turn from
the end of the generation prompt (``<|im_start|>assistant\\n``) up to and including the end-of-turn
token (``<|im_end|>``), thoughts and tool calls included. The line break that templates write after
it is not: generation has stopped by then. A template with ``{% generation %}`` says itself what is
generated, and is believed. In both cases every content must be found in the rendering, as it is:
a template for images and text, say, drops contents that are strings without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kdstore.errors import InputError
from kdstore.inputs.config import InputConfig
from kdstore.inputs.marks import RewrittenError, locate, mark_messages
from kdstore.inputs.messages import Conversation, kind_of
from kdstore.inputs.spans import SpanPainter, TokenMap
from kdstore.inputs.template import CharRange, ChatTemplate
from kdstore.inputs.tokenize import EMPTY, Encoded, tokenize_with_offsets
from kdstore.inputs.turns import Block, assistant_turns, blocks_of


@dataclass(frozen=True)
class _Answer:
    """Characters of one assistant turn."""

    range: CharRange
    supervised: bool


class ChatEncoder:
    """Tokens of conversations under one chat template.

    A conversation is rendered once as it is, and once with marks for its texts unless one of the
    same form was before: never once per message.
    """

    def __init__(self, tokenizer: Any, config: InputConfig) -> None:
        self._tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, config)

    def encode(self, chat: Conversation) -> Encoded:
        """The rendered conversation as tokens and spans.

        Raises InputError if there is no template, or it refuses, drops or rewrites a message, so
        that it is not certain which tokens are the assistant's.
        """
        if not chat.messages:
            return EMPTY
        if self.template.generates(chat.tools, chat.where):
            text, ranges = self.template.render_generated(chat.messages, chat.tools, chat.where)
            blocks = self._blocks(text, chat)
            answers = _generated(ranges, blocks, chat)
        else:
            text = self.template.render(chat.messages, chat.tools, chat.where)
            blocks = self._blocks(text, chat)
            answers = self._turns(text, blocks, chat)
        ids, offsets = tokenize_with_offsets(self._tokenizer, text, chat.where)
        painter = SpanPainter(len(ids))
        _paint(painter, TokenMap(text, offsets), chat, blocks, answers)
        return Encoded(np.array(ids, dtype=np.int32), painter.spans())

    def _blocks(self, text: str, chat: Conversation) -> list[Block]:
        marked, marks = mark_messages(chat.messages)
        skeleton = self.template.skeleton(marked, chat.tools, chat.where)
        try:
            return blocks_of(text, locate(text, skeleton, marks))
        except RewrittenError as error:
            raise self._rewritten(error, chat) from None

    def _turns(self, text: str, blocks: list[Block], chat: Conversation) -> list[_Answer]:
        try:
            return [
                _Answer(turn, index >= chat.first_supervised)
                for index, turn in assistant_turns(text, chat, blocks, self.template)
            ]
        except RewrittenError as error:
            raise self._rewritten(error, chat) from None

    def _rewritten(self, error: RewrittenError, chat: Conversation) -> InputError:
        message = chat.messages[error.message]
        return InputError(
            f"cannot find message {error.message} ({message['role']}) in the rendered conversation:"
            f" the chat template {error}",
            where=f"{chat.where}, message {error.message}, {self.template}",
            expected="a template that writes each text once, as it is",
            got=f"content {message['content']!r:.80}",
            todo="use the chat template that the data was made for, or tokenise yourself and give "
            "input_ids and labels",
        )


def _generated(ranges: list[CharRange], blocks: list[Block], chat: Conversation) -> list[_Answer]:
    """The template's own ranges; supervised are those behind the last text of the prompt."""
    prompt = [block.end for block in blocks if block.message < chat.first_supervised]
    border = max(prompt, default=0)
    return [_Answer(answer, answer[1] > border) for answer in ranges if answer[0] < answer[1]]


def _paint(
    painter: SpanPainter,
    token_map: TokenMap,
    chat: Conversation,
    blocks: list[Block],
    answers: list[_Answer],
) -> None:
    for block in blocks:
        kind = kind_of(chat.messages[block.message]["role"])
        painter.paint(*token_map.tokens(block.start, block.end), kind)
    for answer in answers:
        tokens = token_map.tokens(*answer.range)
        painter.paint(*tokens, "assistant", supervised=answer.supervised)
    for place in (place for block in blocks for place in block.places):
        if place.mark.role == "reasoning":
            painter.paint(*token_map.tokens(place.start, place.end), "reasoning")
