"""What a request asks of the tap; it travels in ``SamplingParams.extra_args``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kdstore.select import Selection, parse_selection

EXTRA_ARG = "kdstore"
OPEN_END = -1  # a run up to whatever the request generates


@dataclass(frozen=True, kw_only=True)
class TapRule:
    """How positions are scored: the same for all that are selected from at once."""

    selection: str
    scalars: tuple[str, ...]
    seed: int
    draw: int
    audit_fraction: float
    num_ids: int

    @cached_property
    def parsed(self) -> Selection:
        """The selection itself."""
        return parse_selection(self.selection)


@dataclass(frozen=True, kw_only=True)
class TapRequest:
    """One sample: ``key`` names its answer, ``runs`` are its scored positions, half-open.

    ``sample_hash`` is ``kdstore.hashing.sample_hash`` of its id. The last run may end at
    ``OPEN_END``: all that is generated from there on is scored too.
    """

    key: int
    rule: TapRule
    sample_hash: int
    runs: tuple[tuple[int, int], ...]

    def to_extra_args(self) -> dict[str, Any]:
        """Numbers, strings and lists, as the engine's transport takes them."""
        return {EXTRA_ARG: {**asdict(self), "runs": [list(run) for run in self.runs]}}

    @classmethod
    def of_extra_args(cls, extra_args: Mapping[str, Any] | None) -> Self | None:
        """The request in a request's ``extra_args``; None if it asks nothing of the tap."""
        found = (extra_args or {}).get(EXTRA_ARG)
        if found is None:
            return None
        rule = TapRule(**{**found["rule"], "scalars": tuple(found["rule"]["scalars"])})
        runs = tuple((start, end) for start, end in found["runs"])
        return cls(key=found["key"], rule=rule, sample_hash=found["sample_hash"], runs=runs)

    def positions_in(self, start: int, end: int) -> NDArray[np.int64]:
        """int64: the scored positions from ``start`` to before ``end``, ascending."""
        parts = [
            np.arange(max(first, start), end if last == OPEN_END else min(last, end))
            for first, last in self.runs
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts])
