"""Drawing the next token of a completion."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdstore.hashing import Purpose, RowKeys
from kdstore.select.distribution import BLOCK, Distribution
from kdstore.select.driver import check_finite
from kdstore.select.sampled import fixed_point, tokens_at


def draw_tokens(logits_CV: Tensor, keys: RowKeys, *, temperature: float, top_p: float) -> Tensor:
    """int64 [C]: the token that each row's one uniform draws.

    Temperature comes first, then top-p. Temperature 0 is the most probable token, of equals the
    lowest id. Raises TeacherError on NaN, on +inf and on rows without a finite logit.
    """
    described = Distribution.of_logits(logits_CV)
    check_finite(described.lse_C, keys)
    if temperature == 0:
        return described.largest_ids(1)[:, 0]
    if temperature != 1:
        described = described.tempered(temperature)
    return tokens_under(described, keys.uniform(Purpose.GENERATION)[:, 0], top_p=top_p)


def tokens_under(described: Distribution, u_C: NDArray[np.float64], *, top_p: float) -> Tensor:
    """int64 [C]: where ``u_C`` in [0, 1) falls in the cumulative sum over the ids of the nucleus.

    >>> rows = Distribution.of_logits(torch.tensor([0.2, 0.5, 0.3]).log().repeat(3, 1))
    >>> tokens_under(rows, np.array([0.1, 0.6, 0.8]), top_p=1.0).tolist()
    [0, 1, 2]
    >>> tokens_under(rows, np.array([0.1, 0.6, 0.8]), top_p=0.7).tolist()
    [1, 1, 2]
    """
    p, block_mass = fixed_point(described)
    if top_p < 1:
        p = nucleus(p, block_mass.sum(-1, keepdim=True) * top_p)
        block_mass = p.view(len(p), -1, BLOCK).sum(-1, dtype=torch.float64)
    u = torch.from_numpy(u_C).to(p.device)[:, None]
    return tokens_at(u * block_mass.sum(-1, keepdim=True), p, block_mass)[:, 0]


def nucleus(p_CW: Tensor, mass_C1: Tensor) -> Tensor:
    """[C, W]: the fewest largest of ``p_CW`` that reach a mass, of equals the lowest ids; else 0.

    Sums are exact where ``p_CW`` is in fixed point.
    """
    sorted_CW, order_CW = p_CW.sort(dim=-1, descending=True, stable=True)
    before_CW = sorted_CW.cumsum(-1, dtype=torch.float64) - sorted_CW
    kept_CW = sorted_CW.masked_fill(before_CW >= mass_C1, 0)
    return torch.zeros_like(p_CW).scatter_(1, order_CW, kept_CW)
