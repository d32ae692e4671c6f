"""The maths of ``benchmarks.quality``: arms, shares of a gap, and bytes at a share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TARGET = 0.95  # of the gap


@dataclass(frozen=True)
class Arm:
    """One way to train: what is stored, and the weights of the losses.

    Arms with the same number of epochs are compared. ``draws`` of them are stored.
    """

    name: str
    selection: str
    losses: Mapping[str, float] = field(default_factory=lambda: {"forward_kl": 1.0})
    epochs: int = 1
    draws: int = 1

    @property
    def family(self) -> str:
        """``pps``, ``counts`` or ``topk``: whose bytes can be read off the same curve."""
        plain = self.draws == 1 and "ce" not in self.losses
        return self.selection.partition(":")[0] if plain else ""

    @property
    def stores_signal(self) -> bool:
        """Whether there is more to store than the text."""
        return set(self.losses) != {"ce"}


_CE = {"ce": 1.0}
ARMS = (
    Arm("ce", "counts:n=1", _CE),
    Arm("full", "full"),
    Arm("pps06", "pps:tau=0.06"),
    Arm("pps036", "pps:tau=0.036"),
    Arm("pps027", "pps:tau=0.027"),
    Arm("pps02", "pps:tau=0.02"),
    Arm("pps018", "pps:tau=0.018"),
    Arm("pps012", "pps:tau=0.012"),
    Arm("counts25", "counts:n=25"),
    Arm("counts50", "counts:n=50"),
    Arm("counts100", "counts:n=100"),
    Arm("topk12", "topk:k=12"),
    Arm("topk50", "topk:k=50"),
    Arm("topk200", "topk:k=200"),
    Arm("topk50_ce", "topk:k=50", {"forward_kl": 1.0, "ce": 0.3}),
    Arm("topk50_ce_convex", "topk:k=50", {"forward_kl": 0.7, "ce": 0.3}),
    Arm("ce_3x", "counts:n=1", _CE, epochs=3),
    Arm("full_3x", "full", epochs=3),
    Arm("pps06_3x", "pps:tau=0.06", epochs=3),
    Arm("pps06_draws3", "pps:tau=0.06", epochs=3, draws=3),
    Arm("pps018_3x", "pps:tau=0.018", epochs=3),
)
QUICK_ARMS = ("ce", "full", "pps06", "pps027", "counts50", "topk50")


def choose_arms(names: Sequence[str]) -> tuple[Arm, ...]:
    """The named arms, and those that theirs is the gap of."""
    unknown = set(names) - {arm.name for arm in ARMS}
    if unknown:
        raise ValueError(f"no arms: {sorted(unknown)}; there are {[arm.name for arm in ARMS]}")
    wanted = [arm for arm in ARMS if arm.name in names]
    needed = {bound for arm in wanted for bound in bounds_of(arm.epochs)}
    return tuple(arm for arm in ARMS if arm in wanted or arm.name in needed)


def bounds_of(epochs: int) -> tuple[str, str]:
    """The arms at 0 and at 1 of the gap, for so many epochs."""
    return ("ce", "full") if epochs == 1 else (f"ce_{epochs}x", f"full_{epochs}x")


@dataclass(frozen=True)
class Run:
    """What an arm costs and what became of its student, for one seed.

    ``signal`` and ``total`` are bytes per position, ``held_out_ce`` nats per position.
    """

    arm: str
    seed: int
    signal: float
    total: float
    entries: float
    held_out_ce: float


@dataclass(frozen=True)
class Result:
    """The runs of an arm, seed after seed: means of what it costs, and every loss."""

    arm: Arm
    signal: float
    total: float
    entries: float
    held_out_ce: tuple[float, ...]

    @classmethod
    def of_runs(cls, arm: Arm, runs: Iterable[Run]) -> Result:
        """From the runs of all arms."""
        own = sorted((run for run in runs if run.arm == arm.name), key=lambda run: run.seed)
        costs = np.mean([(run.signal, run.total, run.entries) for run in own], axis=0)
        signal, total, entries = costs.tolist()
        return cls(arm, signal, total, entries, tuple(run.held_out_ce for run in own))


def missing(arms: Iterable[Arm], runs: Iterable[Run], *, seeds: int) -> list[tuple[Arm, int]]:
    """The arms and seeds of which there is no run, seed after seed."""
    known = {(run.arm, run.seed) for run in runs}
    pairs = itertools.product(range(seeds), arms)
    return [(arm, seed) for seed, arm in pairs if (arm.name, seed) not in known]


def results_of(arms: Iterable[Arm], runs: Iterable[Run], *, seeds: int) -> list[Result]:
    """The arms' runs of the first ``seeds`` seeds."""
    wanted = [run for run in runs if run.seed < seeds]
    return [Result.of_runs(arm, wanted) for arm in arms]


@dataclass(frozen=True)
class Judged:
    """A result beside the bounds of its gap, seed by seed."""

    result: Result
    gap_closed: tuple[float, ...]
    above_full: tuple[float, ...]

    @property
    def share(self) -> float:
        """Mean share of the gap that is closed."""
        return float(np.mean(self.gap_closed))


def judge(results: Sequence[Result]) -> list[Judged]:
    """Every result against the bounds with as many epochs."""
    losses = {result.arm.name: np.array(result.held_out_ce) for result in results}
    found = []
    for result in results:
        ce, full = (losses[name] for name in bounds_of(result.arm.epochs))
        own = losses[result.arm.name]
        found.append(Judged(result, gap_closed(own, ce=ce, full=full), _floats(own - full)))
    return found


def gap_closed(own: Any, *, ce: Any, full: Any) -> tuple[float, ...]:
    """Share of the gap between ``ce`` and ``full`` that each seed's student closes.

    >>> gap_closed([1.5, 2.0], ce=[2.0, 2.0], full=[1.0, 1.0])
    (0.5, 0.0)
    """
    own, ce, full = (np.asarray(values, dtype=np.float64) for values in (own, ce, full))
    return _floats((ce - own) / (ce - full))


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def curve(judged: Iterable[Judged], family: str) -> list[tuple[float, float]]:
    """(signal bytes, mean share) of the one-epoch arms of a family, by bytes."""
    members = [one for one in judged if one.result.arm.family == family]
    return sorted((one.result.signal, one.share) for one in members if one.result.arm.epochs == 1)


def bytes_at(points: Sequence[tuple[float, float]], share: float) -> float | None:
    """Bytes at which a curve first reaches a share; None if it does not, or begins above it.

    Between two points the share is linear in the logarithm of the bytes.

    >>> round(bytes_at([(1, 0.2), (4, 0.8)], 0.5), 6)
    2.0
    """
    for (low, below), (high, above) in itertools.pairwise(points):
        if below <= share <= above:
            part = 0.0 if above == below else (share - below) / (above - below)
            return float(np.exp(np.log(low) + part * (np.log(high) - np.log(low))))
    return None


def smallest(judged: Iterable[Judged], family: str, *, share: float) -> Judged | None:
    """The one-epoch arm of a family that closes so much with the fewest bytes."""
    fits = [
        one
        for one in judged
        if one.result.arm.family == family and one.result.arm.epochs == 1 and one.share >= share
    ]
    return min(fits, key=lambda one: one.result.signal, default=None)


def best_topk(judged: Iterable[Judged]) -> Judged | None:
    """The one-epoch arm on any top-k, mixed with labels or not, that closes most."""
    fits = [one for one in judged if one.result.arm.selection.startswith("topk")]
    return max(fits, key=lambda one: one.share, default=None)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
