"""InputConfig: how rows become samples. It is part of a store's identity."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from kdstore.errors import UsageError

Overlong = Literal["split", "truncate", "error"]
TokenPolicy = Literal["auto", "always", "never"]

_RESERVED_OPTIONS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "messages",
    "tokenize",
    "tools",
}


@dataclass(frozen=True)
class InputConfig:
    """What is done to rows on their way to samples; every field is JSON-able.

    max_length: most tokens of a sample, BOS and EOS included; None for no limit.
    overlong: what happens to longer rows. ``split`` cuts them into samples ``id#0``, ``id#1``, …;
        ``truncate`` keeps the first ``max_length`` tokens; ``error`` refuses them.
    add_bos: whether ``text`` and ``prompt``+``completion`` rows begin with BOS. ``auto``: as the
        tokenizer itself does it. A text that already begins with the BOS token gets no second one.
    add_eos: whether the same rows end with EOS, which is supervised, so that a student learns to
        stop. ``auto``: if the tokenizer has one. A text that ends with it gets no second one.
    keep_text: keep the text or the messages beside the tokens.
    template_date: the day (ISO) that a chat template sees as today. Templates that write the date
        (Llama 3.1's does) would else give other tokens when a dump is resumed the next day.
    template_options: further variables of the chat template, such as ``enable_thinking``.

    ``messages`` rows get neither BOS nor EOS: that is the chat template's business. ``input_ids``
    rows are taken as they are. Raises UsageError for a value outside these choices.
    """

    max_length: int | None = None
    overlong: Overlong = "split"
    add_bos: TokenPolicy = "auto"
    add_eos: TokenPolicy = "auto"
    keep_text: bool = False
    template_date: str = "2025-01-01"
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("overlong", self.overlong, get_args(Overlong))
        _check_choice("add_bos", self.add_bos, get_args(TokenPolicy))
        _check_choice("add_eos", self.add_eos, get_args(TokenPolicy))
        # A piece of one token has no scored position, and with BOS no room for a second.
        if self.max_length is not None and self.max_length < 2:
            raise UsageError("max_length too small", expected="at least 2", got=self.max_length)
        _check_date(self.template_date)
        _check_options(self.template_options)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputConfig:
        """The config that ``to_dict`` wrote. Raises UsageError for an unknown field."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError("unknown input option", expected=sorted(known), got=unknown)
        return cls(**values)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"unknown value of {name}", expected=f"one of {choices}", got=repr(value))


def _check_date(value: str) -> None:
    try:
        datetime.date.fromisoformat(value)
    except ValueError as error:
        raise UsageError(
            "template_date is not a date", expected="YYYY-MM-DD", got=repr(value)
        ) from error


def _check_options(options: Mapping[str, Any]) -> None:
    if clash := sorted(_RESERVED_OPTIONS & set(options)):
        raise UsageError("template_options that kdstore sets itself", got=clash, todo="leave out")
    try:
        json.dumps(dict(options), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            "template_options cannot be kept in a store", expected="JSON values", got=error
        ) from error
