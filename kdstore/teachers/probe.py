"""Probes of a model with a few tokens: is it causal, do packed samples stay apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kdstore.readers.collate import varlen_inputs

PROBE_TOKENS = 8
PREFIX_TOKENS = 5
_TOLERANCES = {torch.float32: 1e-3}  # of the largest logit; other dtypes:
_COARSE_TOLERANCE = 0.02


def probe_ids(device: torch.device) -> Tensor:
    """int64 [1, 8]: the first ids of any vocabulary."""
    return torch.arange(PROBE_TOKENS, device=device)[None]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """In evaluation mode; then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def probing(model: Any, *, known: str | None = None) -> Iterator[None]:
    """In evaluation mode, with an attention that runs on every device; then as it was.

    ``known`` is one more that does.
    """
    attention = model.config._attn_implementation
    elsewhere = attention not in (None, "eager", "sdpa", known)
    if elsewhere:
        model.set_attn_implementation("eager")
    try:
        with evaluating(model):
            yield
    finally:
        if elsewhere:
            model.set_attn_implementation(attention)


@torch.inference_mode()
def is_causal(model: Any) -> bool:
    """Whether a model in evaluation mode answers a prefix alike, whatever follows it."""
    ids = probe_ids(model.device)
    whole = model(input_ids=ids, use_cache=False).logits[0]
    prefix = model(input_ids=ids[:, :PREFIX_TOKENS], use_cache=False).logits[0]
    return close(prefix, whole[:PREFIX_TOKENS])


@torch.inference_mode()
def keeps_packed_apart(model: Any, *, by_lengths: bool = False) -> bool:
    """Whether two samples in one row are answered as each alone.

    transformers tells samples apart by their position ids, which not every architecture reads. Or
    ``by_lengths``, which not every architecture hands to its attention; alone they have a mask.
    """
    ids = probe_ids(model.device)
    starts = (slice(0, PREFIX_TOKENS), slice(PREFIX_TOKENS, PROBE_TOKENS))
    alone = []
    for part in starts:
        mask = {"attention_mask": torch.ones_like(ids[:, part])} if by_lengths else {}
        alone.append(model(input_ids=ids[:, part], use_cache=False, **mask).logits[0])
    positions = torch.cat([torch.arange(part.stop - part.start) for part in starts])
    inputs = {"input_ids": ids, "position_ids": positions[None].to(ids.device), "use_cache": False}
    packed = model(**inputs, **(_lengths(ids) if by_lengths else {}))
    return close(packed.logits[0], torch.cat(alone))


def _lengths(ids: Tensor) -> dict[str, Any]:
    """The two samples of a packed row, as attention that takes lengths is told of them."""
    starts = torch.tensor([0, PREFIX_TOKENS, PROBE_TOKENS], dtype=torch.int32, device=ids.device)
    return varlen_inputs(starts, longest=max(PREFIX_TOKENS, PROBE_TOKENS - PREFIX_TOKENS))


def close(one: Tensor, other: Tensor) -> bool:
    """Whether logits agree but for the rounding of their dtype, NaN and infinity alike."""
    tolerance = _TOLERANCES.get(other.dtype, _COARSE_TOLERANCE)
    one, other = one.float(), other.float()
    finite = torch.isfinite(other)
    if one.shape != other.shape or not torch.equal(torch.isfinite(one), finite):
        return False
    scale = max(_largest(other[finite]), 1e-3)
    return _largest(one[finite] - other[finite]) <= tolerance * scale


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
