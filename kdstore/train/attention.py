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


def mask_of_padding(
    *, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """The mask of padded rows and of answers to a cache; None where samples are told by lengths."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and q_length == kv_length:
        return None
    # sdpa leaves out the mask of rows that are full, which would look like packed ones here.
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **(kwargs | skips)
    )


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

    Samples are told apart by ``cu_seq_lens_q``, else by positions that start again at 0; rows that
    come with neither are refused. Padded rows, and answers to a cache, go to ``sdpa``. Raises
    UsageError for what it does not do.
    """
    _refuse(module, attention_mask, kwargs)
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    rows, heads, length, _ = query.shape
    bounds = _bounds(module, kwargs, rows, length)
    _refuse_shorter_reach(module, sliding_window, max(b - a for a, b in pairwise(bounds)))
    flat = [one.transpose(0, 1).flatten(1, 2) for one in (query, key, value)]
    parts = [
        _causal([one[None, :, start:end] for one in flat], dropout, scaling, sliding_window)
        for start, end in pairwise(bounds)
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


def _bounds(module: nn.Module, given: dict[str, Any], rows: int, length: int) -> list[int]:
    """Where samples begin in the row of all tokens, and its end."""
    starts, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    if starts is not None:
        if not hasattr(starts, "on_host"):  # once, not in every layer: it waits for the device
            starts.on_host = starts.tolist()
        return list(starts.on_host)
    if positions is None:
        raise _unfit(
            module,
            "cannot know where samples begin",
            expected="cu_seq_lens_q, position_ids or attention_mask",
            got="a model that hands none of them to its attention",
        )
    begins = positions.expand(rows, length) == 0
    begins[:, 0] = True
    return [*torch.nonzero(begins.flatten()).flatten().tolist(), rows * length]


def _refuse(module: nn.Module, attention_mask: Tensor | None, given: dict[str, Any]) -> None:
    if attention_mask is not None and given.get("cu_seq_lens_q") is not None:
        raise _unfit(module, "takes a mask or lengths", got="both: the model makes its own mask")
    for name in ("softcap", "s_aux", "position_bias"):
        if given.get(name) is not None:
            raise _unfit(module, f"does not do {name}", got=name)
    is_causal = given.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _unfit(module, "does only causal attention", got="is_causal=False")


def _refuse_shorter_reach(module: nn.Module, window: int | None, longest: int) -> None:
    """UsageError for a layer that relies on its mask to see less than a whole sample."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds and layer is not None else "sliding_attention"
    names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    reach = getattr(config, names.get(kind, ""), None)
    if window is None and reach is not None and longest > reach:
        raise _unfit(
            module,
            "was not told how far the layer sees",
            expected=f"samples of at most {reach} tokens, or a layer that passes sliding_window",
            got=f"a sample of {longest} tokens",
        )


def _unfit(module: nn.Module, what: str, *, got: str, expected: str = "") -> UsageError:
    return UsageError(
        f"varlen_sdpa {what}",
        where=type(module).__name__,
        expected=expected or "plain attention, with a sliding window at most",
        got=got,
        todo="set student.attn_implementation to eager, or to a flash attention",
    )
