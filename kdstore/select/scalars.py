"""The scalars of a position, computed from its full distribution.

* ``label_logprob``: log-probability of the token that stands there, -inf if it has none
* ``label_rank``: 1 + the number of tokens more probable than it
* ``entropy``: nats, of the distribution that the entries describe (tempered where a selection is)
* ``lse``: log-sum-exp of the raw logits
* ``lse_T<temperature>``: log of the sum of p^(1/T); an entry at T is logp/T - lse_T
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdstore.errors import UsageError

LSE_T_PREFIX = "lse_T"


def compute_scalars(
    names: tuple[str, ...], logp_CV: Tensor, labels_C: Tensor, *, lse: Tensor, tempered: Tensor
) -> dict[str, Tensor]:
    """float32 [C] for each name; UsageError for a name that no scalar has."""
    label_logp = _label_logprob(logp_CV, labels_C)
    known: dict[str, Callable[[], Tensor]] = {
        "label_logprob": lambda: label_logp,
        "label_rank": lambda: ((logp_CV > label_logp[:, None]).sum(-1) + 1).float(),
        "entropy": lambda: _entropy(tempered),
        "lse": lambda: lse,
    }
    values = {}
    for name in names:
        if name in known:
            values[name] = known[name]()
        else:
            values[name] = (logp_CV / temperature_of(name)).logsumexp(-1)
    return values


def temperature_of(name: str) -> float:
    """The temperature in a scalar's name ``lse_T1.5``; UsageError if it is no such name."""
    try:
        temperature = float(name.removeprefix(LSE_T_PREFIX))
    except ValueError:
        temperature = 0.0
    if not name.startswith(LSE_T_PREFIX) or not 0.01 <= temperature <= 100:
        raise UsageError(
            f"unknown scalar {name!r}",
            expected="label_logprob, label_rank, entropy, lse or lse_T and 0.01 to 100",
            got=name,
        )
    return temperature


def _entropy(logp_CV: Tensor) -> Tensor:
    terms = logp_CV.exp() * logp_CV.clamp(min=-1e4)  # 0 · -inf is 0 here: exp(-1e4) is 0
    return -terms.sum(-1, dtype=torch.float64).float()


def _label_logprob(logp_CV: Tensor, labels_C: Tensor) -> Tensor:
    inside = labels_C < logp_CV.shape[1]
    picked = logp_CV.gather(1, labels_C.where(inside, 0)[:, None])[:, 0]
    return picked.where(inside, -torch.inf)
