"""Signals from what engines and servers say of the most probable tokens, without full logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdstore.signal import SparseSignal


@dataclass(frozen=True, eq=False)
class TopLogprobs:
    """The k most probable tokens of S positions and the tokens that stand there, all float64.

    ``label_ranks_S`` is None where the server does not say.
    """

    ids_SK: NDArray[np.int64]
    logprobs_SK: NDArray[np.float64]
    label_logprobs_S: NDArray[np.float64]
    label_ranks_S: NDArray[np.float64] | None


def padding_mass(answer: TopLogprobs, num_ids: int) -> NDArray[np.float64]:
    """float64 [S]: probability of the entries that the tokenizer has no id for."""
    masses_SK = np.where(answer.ids_SK >= num_ids, np.exp(answer.logprobs_SK), 0.0)
    return np.asarray(masses_SK.sum(1))


def signal_of(
    answer: TopLogprobs, spec: str, scalars: Sequence[str], *, num_ids: int
) -> SparseSignal:
    """The signal of an answer, given that no token is one of the padding that it shows.

    The rest is log(1 - sum), all that can be known: off by the rounding of the sum, about 1e-6.
    """
    with np.errstate(divide="ignore"):
        scale_S1 = np.log1p(-np.minimum(padding_mass(answer, num_ids), 1.0))[:, None]
        logprobs_SK = np.minimum(answer.logprobs_SK - scale_S1, 0.0)
        kept_SK = (answer.ids_SK < num_ids) & (logprobs_SK > -np.inf)
        mass_S = np.where(kept_SK, np.exp(logprobs_SK), 0.0).sum(1)
        rest_S = np.log1p(-np.minimum(mass_S, 1.0))
    order_SK = np.argsort(answer.ids_SK, axis=1)
    kept_SK, ids_SK, logprobs_SK = (
        np.take_along_axis(array, order_SK, axis=1)
        for array in (kept_SK, answer.ids_SK, logprobs_SK)
    )
    labels_S = answer.label_logprobs_S
    known = {"label_logprob": np.minimum(labels_S - scale_S1[:, 0], 0.0)}
    if answer.label_ranks_S is not None:
        above_SK = (answer.ids_SK >= num_ids) & (answer.logprobs_SK > labels_S[:, None])
        known["label_rank"] = answer.label_ranks_S - above_SK.sum(1)
    return SparseSignal.from_arrays(
        spec,
        np.concatenate([[0], np.cumsum(kept_SK.sum(1))]),
        ids_SK[kept_SK],
        logprobs_SK[kept_SK],
        rest_S=rest_S,
        scalars={name: known[name] for name in scalars},
    )
