"""Answers of the tap as one string of bytes: a few arrays for all requests together."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.signal import SparseSignal

_ARRAYS = ("indptr", "ids_N", "logprobs_N", "rest_S", "counts_N", "tail_N")
_SCALAR = "scalars/"


@dataclass(eq=False)
class Answer:
    """What the tap found for one request: its positions so far, and their signals."""

    positions: list[NDArray[np.int64]] = field(default_factory=list)
    signals: list[SparseSignal] = field(default_factory=list)
    audits: list[SparseSignal] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Answered:
    """One request's answer on the other side."""

    positions_S: NDArray[np.int64]
    signal: SparseSignal
    audit: SparseSignal


@dataclass(frozen=True)
class Tally:
    """What a worker counted since it was last asked; seconds are of CPU, of all its threads."""

    num_positions: int = 0
    padding_mass: float = 0.0
    head_s: float = 0.0
    select_s: float = 0.0
    error: str = ""


def pack(answers: Sequence[Answer], tally: Tally) -> bytes:
    """The answers of requests with one rule, and what was counted meanwhile."""
    arrays = {
        "positions": _joined([part for answer in answers for part in answer.positions]),
        "lengths": np.array([sum(map(len, answer.positions)) for answer in answers]),
        "audited": np.array([sum(map(len, answer.audits)) for answer in answers]),
        **_arrays("signal", [part for answer in answers for part in answer.signals]),
        **_arrays("audit", [part for answer in answers for part in answer.audits]),
        **{f"tally/{name}": np.array(value) for name, value in vars(tally).items()},
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(data: bytes, *, selection: str, audit: str) -> tuple[list[Answered], Tally]:
    """What ``pack`` was given; ``selection`` and ``audit`` name what the entries are."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        signal = _signal("signal", selection, arrays)
        audits = _signal("audit", audit, arrays)
        bounds, audited = (np.cumsum([0, *arrays[name]]) for name in ("lengths", "audited"))
        positions = arrays["positions"]
        tally = Tally(**{name: arrays[f"tally/{name}"].item() for name in vars(Tally())})
    spans = zip(pairwise(bounds), pairwise(audited), strict=True)
    answers = [
        Answered(positions[start:end], signal[start:end], audits[first:last])
        for (start, end), (first, last) in spans
    ]
    return answers, tally


def _joined(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _arrays(name: str, signals: Sequence[SparseSignal]) -> dict[str, NDArray[Any]]:
    whole = SparseSignal.concat([*signals, SparseSignal.empty("none")])
    found = {part: getattr(whole, part) for part in _ARRAYS}
    found |= {_SCALAR + scalar: values for scalar, values in whole.scalars.items()}
    return {f"{name}/{part}": array for part, array in found.items() if array is not None}


def _signal(name: str, selection: str, arrays: Any) -> SparseSignal:
    prefix = f"{name}/{_SCALAR}"
    found = {part: arrays.get(f"{name}/{part}") for part in _ARRAYS}
    scalars = {k.removeprefix(prefix): arrays[k] for k in arrays if k.startswith(prefix)}
    return SparseSignal(selection, **found, scalars=scalars)
