"""How much each scored position counts in the losses."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import UsageError
from kdstore.readers.dataset import scalar_of
from kdstore.sample import Sample


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """Weights of the scored positions of a sample, float32 [S]; the product of what is set.

    * ``kinds``: of the positions in spans of a kind; others count 1, later spans prevail
    * ``entropy``, ``label_logprob``: of a scalar in nats, as points ``(value, weight)``, ascending,
      with straight lines between them and level beyond

    Weights multiply the terms of the losses and are no part of the denominator.

    >>> weights = TokenWeights(entropy=[[0.0, 0.2], [2.0, 1.0]])
    >>> weights.curve("entropy", np.array([-1.0, 1.0, 5.0])).round(2).tolist()
    [0.2, 0.6, 1.0]
    """

    kinds: dict[str, float] = field(default_factory=dict)
    entropy: list[list[float]] | None = None
    label_logprob: list[list[float]] | None = None

    def __post_init__(self) -> None:
        _check_weights("kinds", list(self.kinds.values()))
        for name in ("entropy", "label_logprob"):
            _check_curve(name, getattr(self, name))

    def __call__(self, sample: Sample) -> NDArray[np.float32]:
        """The weights; UsageError if the sample lacks a scalar."""
        weights = np.ones(sample.num_tokens)
        for span in sample.spans:
            if span.kind in self.kinds:
                weights[span.start : span.end] = self.kinds[span.kind]
        weights_S = weights[sample.positions_S]
        for name in ("entropy", "label_logprob"):
            if getattr(self, name) is not None:
                weights_S = weights_S * self.curve(name, scalar_of(sample, name))
        return weights_S.astype(np.float32)

    def curve(self, name: str, values_S: NDArray[np.floating]) -> NDArray[np.float64]:
        """The weights that a scalar's values have."""
        values, weights = np.array(getattr(self, name)).T
        found: NDArray[np.float64] = np.interp(values_S, values, weights)
        return found


def _check_curve(name: str, points: list[list[float]] | None) -> None:
    if points is None:
        return
    if not points or not all(len(point) == 2 for point in points):
        raise UsageError(
            "a weight by a scalar is a list of points",
            where=f"weights.{name}",
            expected="[[value, weight], …]",
            got=points,
        )
    values = [value for value, _ in points]
    in_order = all(one < other for one, other in itertools.pairwise(values))
    if not in_order or not all(map(math.isfinite, values)):  # no line leads to infinity
        raise UsageError(
            "points are finite and in ascending order of the scalar",
            where=f"weights.{name}",
            expected=sorted(set(values)),
            got=values,
        )
    _check_weights(name, [weight for _, weight in points])


def _check_weights(name: str, weights: list[float]) -> None:
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise UsageError(
            "a token weight is zero or more", where=f"weights.{name}", expected=">= 0", got=weights
        )
