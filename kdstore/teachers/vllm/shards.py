"""The head of a model on one tensor-parallel rank, which has some columns of the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_USUAL = ("logits_processor", "lm_head")  # all that the usual ``compute_logits`` speaks of


@dataclass(frozen=True, eq=False)
class HeadShard:
    """``local`` gives a rank's columns [C, L] of the logits of hidden states [C, D].

    They are those of ``first_id`` and the ids that follow. ``gather`` makes [P, C, M] of a float64
    [C, M] of each of the P ranks.
    """

    local: Callable[[Tensor], Tensor]
    first_id: int
    gather: Callable[[Tensor], Tensor]


def head_shard(model: Any, *, vocab_size: int) -> HeadShard | None:
    """A model's shard; None if it has all columns, or makes logits in a way of its own."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    while _names(model) == ("language_model", "compute_logits"):
        model = model.language_model
    processor: Any = getattr(model, "logits_processor", None)  # an early pipeline stage has none
    if _names(model) != _USUAL or type(processor) is not LogitsProcessor:
        return None
    head = model.lm_head
    if head.tp_size == 1 or processor.org_vocab_size != vocab_size:
        return None
    shard = head.shard_indices

    def local(hidden_CD: Tensor) -> Tensor:
        logits = processor(head, hidden_CD, skip_gather=True)
        return logits[:, : shard.num_org_elements]  # type: ignore[no-any-return]

    return HeadShard(local, shard.org_vocab_start_index, _gather)


def _names(model: Any) -> tuple[str, ...]:
    code = getattr(getattr(model, "compute_logits", None), "__code__", None)
    return code.co_names if code else ()


def _gather(mine_CM: Tensor) -> Tensor:
    """As float32, which the collectives of all platforms take: they move bits."""
    from vllm.distributed import tensor_model_parallel_all_gather

    bits = mine_CM.contiguous().view(torch.float32)
    found: Tensor = tensor_model_parallel_all_gather(bits, dim=0)
    return found.view(torch.float64).view(-1, *mine_CM.shape)
