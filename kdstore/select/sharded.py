"""``topk`` where the columns of the logits are spread over ranks: little of them travels.

Two rounds: each rank's largest logit and the label's; then its sums, its k largest and the log mass
that it has besides. The answer is that of ``select`` on all columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kdstore.hashing import RowKeys
from kdstore.select.base import Entries, Selection, SelectionStats, compact
from kdstore.select.distribution import Distribution, Scratch, order_keys, row_sums
from kdstore.select.driver import check_finite, lost_mass, to_signal
from kdstore.select.topk import TopK
from kdstore.signal import SparseSignal

SCALARS = frozenset({"label_logprob", "label_rank", "entropy", "lse"})
_NUMBERS = 5  # of a row in the second round, before k logits and k ids


class _Part(Distribution):
    """Some columns of a distribution; its probabilities are relative to the largest of all."""

    @cached_property
    def p_CW(self) -> Tensor:
        return torch.exp(self.shifted_CW, out=self.scratch.p_CW)

    @cached_property
    def total_C(self) -> Tensor:
        return torch.ones_like(self.largest_C, dtype=torch.float64)

    @cached_property
    def log_norm_C(self) -> Tensor:
        return torch.zeros_like(self.largest_C, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Gathered:
    """What all P ranks told of C rows, float64.

    ``first_C2``: the largest logit, and the label's less the largest. ``parts_PCM``: sum of
    p/p_max, sum of p/p_max · log of it, number of tokens above the label, log-sum-exp of padding,
    log of the p/p_max that is not among the k; then the log of those, and their ids.
    """

    first_C2: Tensor
    parts_PCM: Tensor


def fits_ranks(selection: Selection, scalars: Sequence[str], *, audit_fraction: float) -> bool:
    """Whether a selection, its scalars and the audit can do with what ranks tell."""
    return isinstance(selection, TopK) and SCALARS.issuperset(scalars) and not audit_fraction


@torch.no_grad()
def gather_ranks(
    logits_CL: Tensor,
    labels_C: Tensor,
    *,
    first_id: int,
    k: int,
    num_ids: int,
    gather: Callable[[Tensor], Tensor],
) -> Gathered:
    """What ranks tell of rows of which this one has L columns, from ``first_id`` on.

    ``gather`` makes [P, C, M] of the [C, M] of each rank; all ranks call it twice. Ids from
    ``num_ids`` on are padding.
    """
    C, L = logits_CL.shape
    width = min(max(num_ids - first_id, 0), L)
    scratch = Scratch.empty(C, max(width, 1), logits_CL.device)
    z_CW = scratch.shifted_CW.fill_(-torch.inf)
    z_CW[:, :width] = logits_CL[:, :width]
    at_C = labels_C - first_id
    label_C = z_CW.gather(1, at_C.clamp(0, z_CW.shape[1] - 1)[:, None])[:, 0]
    label_C = label_C.where((at_C >= 0) & (at_C < width), -torch.inf)
    first_C2 = gather(torch.stack([z_CW.amax(-1), label_C], 1).double()).amax(0)
    largest_C = first_C2[:, 0].float()
    label_C = first_C2[:, 1].float() - largest_C
    part = _Part(z_CW.sub_(largest_C[:, None]), largest_C, scratch)
    padding_C = logits_CL[:, width:].float().logsumexp(-1)
    told = _told(part, label_C, padding_C, first_id=first_id, k=k)
    return Gathered(torch.stack([largest_C, label_C], 1).double(), gather(told))


def _told(part: _Part, label_C: Tensor, padding_C: Tensor, *, first_id: int, k: int) -> Tensor:
    """float64 [C, M]: one rank's part of ``Gathered``."""
    ids = part.largest_ids(k)
    values = part.logprobs_at(ids)
    told = torch.zeros(len(ids), _NUMBERS + 2 * k, dtype=torch.float64, device=ids.device)
    told[:, _NUMBERS : _NUMBERS + k] = -torch.inf  # a rank may have fewer than k
    told[:, _NUMBERS : _NUMBERS + ids.shape[1]] = values
    told[:, _NUMBERS + k : _NUMBERS + k + ids.shape[1]] = ids + first_id
    told[:, 0] = row_sums(part.p_CW)
    told[:, 2] = (part.shifted_CW > label_C[:, None]).sum(-1)
    told[:, 3] = padding_C
    told[:, 4] = part.log_mass_without(ids)
    finite = torch.clamp(part.shifted_CW, min=-1e4, out=part.scratch.spare_CW)
    told[:, 1] = row_sums(finite.mul_(part.p_CW))
    return told


@torch.no_grad()
def select_gathered(
    gathered: Gathered,
    *,
    selection: Selection,
    keys: RowKeys,
    scalars: Sequence[str],
    stats: SelectionStats,
) -> SparseSignal:
    """The signal of the rows that ranks told of; errors as in ``select``."""
    sums, moment, larger, padding, outside = gathered.parts_PCM[:, :, :_NUMBERS].unbind(-1)
    largest_C, label_C = gathered.first_C2.unbind(-1)
    total_C = sums.sum(0)
    log_norm_C = total_C.log()
    lse_C = largest_C + log_norm_C
    check_finite(lse_C, keys)
    stats.num_positions += len(keys)
    stats.padding_mass += lost_mass(padding.logsumexp(0), lse_C)
    candidates = gathered.parts_PCM[:, :, _NUMBERS:].movedim(0, 1)
    values, ids = (part.flatten(1) for part in candidates.chunk(2, -1))
    k = (gathered.parts_PCM.shape[2] - _NUMBERS) // 2
    at = order_keys(values.float(), ids.long()).topk(k, largest=False).indices
    logprobs = (values.gather(1, at) - log_norm_C[:, None]).float()
    left = torch.cat([outside.T, values.scatter(1, at, -torch.inf)], 1)
    rows_N, ids_N, logprobs_N = compact(ids.long().gather(1, at), logprobs > -torch.inf, logprobs)
    known = {
        "label_logprob": label_C - log_norm_C,
        "label_rank": larger.sum(0) + 1,
        "entropy": log_norm_C - moment.sum(0) / total_C,
        "lse": lse_C,
    }
    rest_C = (left.logsumexp(1) - log_norm_C).float()
    entries = Entries(rows_N, ids_N, logprobs_N, rest_C)
    return to_signal(selection, entries, {name: known[name].float() for name in scalars})
