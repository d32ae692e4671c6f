"""A number that changes as training goes on: loss weights, temperatures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdstore.errors import UsageError
from kdstore.train.fields import build, check_type

_WHERE = "losses: a weight or temperature"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``start`` until the share ``since`` of training is done, ``end`` from ``until`` on.

    Between them ``linear`` is a straight line and ``cosine`` half a wave. ``constant`` stays at
    ``start``.

    >>> Schedule(start=1.0, end=0.0, kind="linear").at(0.25)
    0.75
    """

    start: float
    end: float | None = None
    kind: Literal["constant", "linear", "cosine"] = "linear"
    since: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if (self.kind == "constant") != (self.end is None):
            raise UsageError(
                "a schedule has an end unless it is constant",
                where=_WHERE,
                expected="end, or kind: constant",
                got=f"kind={self.kind}, end={self.end}",
                todo="set end, or give one number for all of training",
            )
        if not 0 <= self.since < self.until <= 1:
            raise UsageError(
                "a schedule runs over a share of training",
                where=_WHERE,
                expected="0 <= since < until <= 1",
                got=f"since={self.since}, until={self.until}",
                todo="divide steps by those of the run; 0.5 is half-way",
            )
        if not all(math.isfinite(value) for value in (self.start, self.end or 0.0)):
            raise UsageError(
                "a weight or temperature is not finite",
                where=_WHERE,
                expected="finite numbers",
                got=f"{self.start} to {self.end}",
                todo="0 leaves a loss out",
            )

    def at(self, progress: float) -> float:
        """The value when a share ``progress`` of training, from 0 to 1, is done."""
        if self.end is None:
            return self.start
        done = min(max((progress - self.since) / (self.until - self.since), 0.0), 1.0)
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    @property
    def is_zero(self) -> bool:
        """Whether it is zero throughout."""
        return self.start == 0 and not self.end


def make_schedule(value: Any, *, where: str) -> Schedule:
    """The schedule that a number, or a mapping of its fields, stands for."""
    if isinstance(value, Mapping):
        return build(Schedule, value, where=where)
    check_type(where, value, float)
    return Schedule(start=value, kind="constant")
