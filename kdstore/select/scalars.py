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
from kdstore.select.distribution import Distribution, row_sums

LSE_T_PREFIX = "lse_T"


def compute_scalars(
    names: tuple[str, ...],
    teacher: Distribution,
    labels_C: Tensor,
    *,
    described: Distribution,
) -> dict[str, Tensor]:
    """float32 [C] for each name; UsageError for a name that no scalar has."""
    label = _label_shifted(teacher, labels_C)
    known: dict[str, Callable[[], Tensor]] = {
        "label_logprob": lambda: label - teacher.log_norm_C,
        "label_rank": lambda: _rank(teacher, label),
        "entropy": lambda: _entropy(described),
        "lse": lambda: teacher.lse_C,
    }
    values = {}
    for name in names:
        if name in known:
            values[name] = known[name]()
        else:
            temperature = temperature_of(name)
            log_norm = teacher.tempered(temperature).log_norm_C
            values[name] = log_norm - teacher.log_norm_C / temperature
    return {name: value.float() for name, value in values.items()}


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


def _entropy(described: Distribution) -> Tensor:
    # 0 · -inf is 0 here, and exp(-1e4) is 0
    finite = torch.clamp(described.shifted_CW, min=-1e4, out=described.scratch.spare_CW)
    return described.log_norm_C - row_sums(finite.mul_(described.p_CW)) / described.total_C


def _rank(teacher: Distribution, label_C: Tensor) -> Tensor:
    """Comparing to float takes a quarter of the time of comparing to bool."""
    larger = torch.gt(teacher.shifted_CW, label_C[:, None], out=teacher.scratch.spare_CW)
    return larger.sum(-1) + 1


def _label_shifted(teacher: Distribution, labels_C: Tensor) -> Tensor:
    inside = labels_C < teacher.shifted_CW.shape[1]
    picked = teacher.shifted_CW.gather(1, labels_C.where(inside, 0)[:, None])[:, 0]
    return picked.where(inside, -torch.inf)
