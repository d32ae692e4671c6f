"""From the text of a selection to its rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from kdstore.errors import UsageError
from kdstore.select.base import Selection
from kdstore.select.counts import Counts
from kdstore.select.full import Full
from kdstore.select.pps import PPS
from kdstore.select.topk import TopK
from kdstore.select.topp import TopP

SELECTIONS: dict[str, type[Selection]] = {cls.kind: cls for cls in (TopK, TopP, PPS, Counts, Full)}
DEFAULT_SELECTION = PPS().spec


def parse_selection(spec: str) -> Selection:
    """The selection that ``kind`` or ``kind:option=value,…`` names.

    Raises UsageError for an unknown kind, an unknown option or a value out of range.

    >>> parse_selection("topk:k=8").spec
    'topk:k=8'
    """
    kind, _, text = spec.partition(":")
    if kind not in SELECTIONS:
        raise UsageError(
            f"unknown selection {kind!r}",
            where=f"--select {spec}",
            expected="one of " + ", ".join(sorted(SELECTIONS)),
            got=kind,
        )
    cls = SELECTIONS[kind]
    return cls(**_options(cls, spec, [part for part in text.split(",") if part]))


def _options(cls: type[Selection], spec: str, parts: list[str]) -> dict[str, int | float]:
    types = {field.name: (int if field.type == "int" else float) for field in fields(cls)}
    options: dict[str, int | float] = {}
    for part in parts:
        name, _, value = part.partition("=")
        try:
            if name in options:
                raise KeyError(name)
            options[name] = types[name](value)
        except (KeyError, ValueError):
            raise UsageError(
                f"cannot read selection option {part!r}",
                where=f"--select {spec}",
                expected=_options_of(types),
                got=part,
            ) from None
    return options


def _options_of(types: Mapping[str, type]) -> str:
    return (
        ", ".join(f"{n}=<{t.__name__}>" for n, t in types.items()) + ", each once"
        if types
        else "none"
    )
