"""Completions by transformers, every token drawn from one keyed uniform.

transformers' own sampling takes its numbers from a stream that all rows of a batch share. Here the
tokens are drawn before it looks: what is left of the logits is the token that was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdstore.completion import Completion, Prompt, Sampling
from kdstore.hashing import RowKeys
from kdstore.select.draw import draw_tokens


@torch.inference_mode()
def complete(
    model: Any, batch: Sequence[Prompt], sampling: Sampling, *, num_ids: int
) -> list[Completion]:
    """The completions of a batch, all of whose prompts have the same ``max_tokens``.

    Ids from ``num_ids`` on are never drawn.
    """
    from transformers import GenerationConfig

    ids_BL, mask_BL = left_padded(batch)
    model.generation_config = GenerationConfig()  # else it fills in what the checkpoint prefers
    found: Tensor = model.generate(
        input_ids=ids_BL.to(model.device),
        attention_mask=mask_BL.to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=batch[0].max_tokens,
            do_sample=False,
            eos_token_id=list(sampling.stop_ids) or None,
            pad_token_id=0,  # behind the end, where nobody looks
        ),
        logits_processor=[_KeyedDraw(batch, sampling, num_ids=num_ids)],
    )
    rows_BM = found[:, ids_BL.shape[1] :].cpu().numpy().astype(np.int32)
    return [_cut(prompt, row, sampling) for prompt, row in zip(batch, rows_BM, strict=True)]


class _KeyedDraw:
    """A logits processor that leaves each row the token that its uniform draws.

    The uniform is that of the sample and of the position which the token will hold.
    """

    def __init__(self, batch: Sequence[Prompt], sampling: Sampling, *, num_ids: int) -> None:
        self._sampling, self._num_ids = sampling, num_ids
        self._width = max(prompt.num_tokens for prompt in batch)
        next_positions = [(p.sample_id, np.array([p.num_tokens])) for p in batch]
        self._keys = RowKeys.of_samples(next_positions, seed=sampling.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._width
        ids_B = draw_tokens(
            scores[:, : self._num_ids],
            replace(self._keys, position_S=self._keys.position_S + step),
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
        )
        return torch.full_like(scores, -torch.inf).scatter_(1, ids_B[:, None], 0.0)


def left_padded(batch: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """``input_ids`` [B, L], padded on the left, and their attention mask."""
    width = max(prompt.num_tokens for prompt in batch)
    ids = np.zeros((len(batch), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, prompt in enumerate(batch):
        ids[index, width - prompt.num_tokens :] = prompt.input_ids_T
        mask[index, width - prompt.num_tokens :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _cut(prompt: Prompt, row_M: NDArray[np.int32], sampling: Sampling) -> Completion:
    """A row up to its first stop id, which is kept."""
    stops = np.flatnonzero(np.isin(row_M, sampling.stop_ids))
    if len(stops):
        return Completion(prompt.sample_id, row_M[: stops[0] + 1], "stop")
    return Completion(prompt.sample_id, row_M, "length")
