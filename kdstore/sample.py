"""Samples: one token sequence, the ranges that have a meaning, and which positions are scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import InputError

if TYPE_CHECKING:
    from kdstore.signal import SparseSignal

ScoreRule = Literal["supervised", "all"]


@dataclass(frozen=True)
class Span:
    """A half-open token range ``[start, end)`` and what it holds.

    ``kind`` is one of system, user, assistant, tool, reasoning, template, text; an unknown kind is
    kept as it is.
    """

    start: int
    end: int
    kind: str
    supervised: bool


@dataclass(frozen=True, eq=False)
class Sample:
    """One token sequence ``input_ids_T`` (int32) and all that is known of it.

    ``runs`` are the scored positions as half-open ascending ranges; they are normative, spans are
    annotation. ``signal`` is the teacher's answer for those positions, None before scoring.
    ``audit`` is the sample as the audit signal has it, at audited positions; only dumps set it.
    ``teachers`` are the sample as other teachers have it; only joins set it.
    """

    sample_id: str
    input_ids_T: NDArray[np.int32]
    spans: tuple[Span, ...] = ()
    runs: tuple[tuple[int, int], ...] = ()
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    metadata: dict[str, Any] | None = None
    signal: SparseSignal | None = field(default=None, repr=False)
    audit: Sample | None = field(default=None, repr=False)
    teachers: Mapping[str, Sample] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_ranges(self)

    @property
    def num_tokens(self) -> int:
        """Length of the sequence in tokens."""
        return len(self.input_ids_T)

    @property
    def num_scored(self) -> int:
        """Number of scored positions S."""
        return sum(end - start for start, end in self.runs)

    @cached_property
    def positions_S(self) -> NDArray[np.int64]:
        """int64 [S]: the scored positions, ascending. Position t holds the signal of token t."""
        return positions_of_runs(self.runs)

    @property
    def previous_S(self) -> NDArray[np.int32]:
        """int32 [S]: the token before each scored position."""
        return self.input_ids_T[self.positions_S - 1]

    def with_score_rule(self, rule: ScoreRule) -> Sample:
        """The same sample, scored where it is supervised, or at every position but the first."""
        if rule == "all":
            return replace(self, runs=((1, self.num_tokens),) if self.num_tokens > 1 else ())
        ranges = [(max(span.start, 1), span.end) for span in self.spans if span.supervised]
        return replace(self, runs=merge_ranges(ranges))

    def part(self, start: int, end: int) -> Sample:
        """The sample of tokens ``[start, end)``, with the signal of all of them but the first.

        Nothing precedes the first one. Text, messages and audit are of the whole, and left out.
        """
        positions = self.positions_S
        kept = (positions > start) & (positions < end)
        spans = [
            replace(span, start=max(span.start, start) - start, end=min(span.end, end) - start)
            for span in self.spans
            if span.start < end and span.end > start
        ]
        return Sample(
            self.sample_id,
            self.input_ids_T[start:end],
            spans=tuple(spans),
            runs=runs_of_positions(positions[kept] - start),
            metadata=self.metadata,
            signal=None if self.signal is None else self.signal[kept],
            teachers={name: other.part(start, end) for name, other in self.teachers.items()},
        )

    def at(self, kept_S: NDArray[np.bool_]) -> Sample:
        """The same sample, scored only at some of its positions, also by other teachers."""
        if kept_S.all() and not self.teachers:
            return self
        positions = self.positions_S[kept_S]
        teachers = {
            name: other.at(np.isin(other.positions_S, positions))
            for name, other in self.teachers.items()
        }
        signal = None if self.signal is None else self.signal[kept_S]
        runs = runs_of_positions(positions)
        return replace(self, runs=runs, signal=signal, teachers=teachers)


def positions_of_runs(runs: tuple[tuple[int, int], ...]) -> NDArray[np.int64]:
    """int64 [S]: the positions that half-open runs cover."""
    parts = [np.arange(start, end, dtype=np.int64) for start, end in runs]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def runs_of_positions(positions: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """The fewest half-open runs that cover ascending positions."""
    gaps = np.flatnonzero(np.diff(positions) != 1)
    starts = positions[np.concatenate([[0], gaps + 1])] if len(positions) else positions
    ends = positions[np.concatenate([gaps, [-1]])] + 1 if len(positions) else positions
    return tuple(zip(starts.tolist(), ends.tolist(), strict=True))


def merge_ranges(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ascending disjoint ranges that cover the same positions; empty ones vanish."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(pair for pair in ranges if pair[0] < pair[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _check_ranges(sample: Sample) -> None:
    where = f"sample {sample.sample_id!r}"
    for span in sample.spans:
        if not 0 <= span.start <= span.end <= sample.num_tokens:
            raise InputError(
                "span outside its sample",
                where=where,
                expected=f"0 <= start <= end <= {sample.num_tokens}",
                got=span,
            )
    previous = 1
    for start, end in sample.runs:
        if not previous <= start < end <= sample.num_tokens:
            raise InputError(
                "scored runs must ascend, not overlap and leave out position 0",
                where=where,
                expected=f"{previous} <= start < end <= {sample.num_tokens}",
                got=(start, end),
            )
        previous = end
