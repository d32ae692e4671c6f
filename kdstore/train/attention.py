"""Attention within the samples of packed rows, without a mask of rows times rows.

transformers' ``sdpa`` keeps packed samples apart by a mask of L x L, of which it computes all.
``varlen_sdpa`` calls torch's scaled_dot_product_attention for each sample alone: the same numbers,
on any device, in the time and memory of the samples. Where flash attention is installed,
``flash_attention_2`` does that in one kernel. Both are told of the samples by
``Batch.model_inputs(varlen=True)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from kdstore.errors import UsageError

VARLEN_SDPA = "varlen_sdpa"


def register_varlen_sdpa() -> None:
    """Make ``attn_implementation="varlen_sdpa"`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN_SDPA, varlen_sdpa)
    AttentionMaskInterface.register(VARLEN_SDPA, mask_of_padding)


def takes_lengths(model: Any) -> bool:
    """Whether a model's attention is told of packed samples by their lengths."""
    name = str(getattr(model.config, "_attn_implementation", None))
    return name == VARLEN_SDPA or "flash" in name


def mask_of_padding(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The mask of padded rows, as ``sdpa`` has it; None for rows without padding."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def varlen_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, L, H, d] from [B, H, L, d]; each sample sees itself, up to the token that asks.

    Samples are told apart by ``cu_seq_lens_q``, else by positions that start again at 0. Padded
    rows, and answers to a cache, go to ``sdpa``. Raises UsageError for what it does not do.
    """
    _refuse(module, kwargs)
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    rows, heads, length, _ = query.shape
    flat = [one.transpose(0, 1).flatten(1, 2) for one in (query, key, value)]
    parts = [
        _causal([one[None, :, start:end] for one in flat], dropout, scaling, sliding_window)
        for start, end in pairwise(_bounds(kwargs, rows * length, length))
    ]
    whole = torch.cat(parts, dim=2)[0]
    return whole.view(heads, rows, length, -1).permute(1, 2, 0, 3).contiguous(), None


def _causal(
    parts: Sequence[Tensor], dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """[1, H, L, d] of query, key and value of one sample."""
    query, key, value = parts
    length, mask = query.shape[2], None
    if window is not None and length > window:
        ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = ones.tril() & ones.triu(1 - window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _bounds(given: dict[str, Any], tokens: int, length: int) -> list[int]:
    """Where samples begin in the row of all tokens, and its end."""
    starts = given.get("cu_seq_lens_q")
    if starts is not None:
        return list(starts.tolist())
    positions = given.get("position_ids")
    if positions is None:
        return list(range(0, tokens + 1, length))
    begins = positions.expand(tokens // length, length).flatten() == 0
    return [*torch.nonzero(begins).flatten().tolist(), tokens]


def _refuse(module: nn.Module, given: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if given.get(name) is not None:
            raise UsageError(
                f"varlen_sdpa does not do {name}",
                where=type(module).__name__,
                expected="plain attention, with a sliding window at most",
                got=name,
                todo="set student.attn_implementation to eager, or to a flash attention",
            )
