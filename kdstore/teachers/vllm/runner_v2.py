"""The tap on vLLM's V2 model runner (``v1/worker/gpu/model_runner.py``), the default on GPUs.

The runner owns a worker for prompt log-probabilities, tells it of every request, and asks it once
a step, with the hidden states. The tap takes that worker's place and hands everything on to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdstore.teachers.vllm.request import TapRequest
from kdstore.teachers.vllm.tap import Computed, Tap

ATTRIBUTE = "prompt_logprobs_worker"
METHODS = {
    "add_request": ("req_id", "req_idx", "sampling_params"),
    "remove_request": ("req_id",),
    "compute_prompt_logprobs": (
        "logits_fn",
        "hidden_states",
        "input_batch",
        "all_token_ids",
        "num_computed_tokens",
        "prompt_lens",
    ),
}


class RunnerV2:
    """A prompt log-probabilities worker that tells the tap what each step computed.

    Prompt positions only: a generated token is not in the runner's table yet when its step asks.
    """

    def __init__(self, runner: Any, tap: Tap) -> None:
        self._worker, self._tap = getattr(runner, ATTRIBUTE), tap
        self._requests: dict[str, TapRequest] = {}
        setattr(runner, ATTRIBUTE, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        """A request begins."""
        request = TapRequest.of_extra_args(sampling_params.extra_args)
        if request is not None:
            self._requests[req_id] = request
        self._worker.add_request(req_id, req_idx, sampling_params)

    def remove_request(self, req_id: str) -> None:
        """A request has ended, or lost its place."""
        self._requests.pop(req_id, None)
        self._worker.remove_request(req_id)

    def compute_prompt_logprobs(
        self,
        logits_fn: Any,
        hidden_states: Tensor,
        input_batch: Any,
        all_token_ids: Tensor,
        num_computed_tokens: Tensor,
        prompt_lens: NDArray[np.int32],
    ) -> Any:
        """The tap's step, then the worker's own."""
        computed = [
            self._computed(index, request, input_batch, all_token_ids, prompt_lens)
            for index, name in enumerate(input_batch.req_ids)
            if (request := self._requests.get(name)) is not None
        ]
        self._tap.step(hidden_states, computed)
        return self._worker.compute_prompt_logprobs(
            logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )

    def _computed(
        self,
        index: int,
        request: TapRequest,
        input_batch: Any,
        all_token_ids: Tensor,
        prompt_lens: NDArray[np.int32],
    ) -> Computed:
        state = int(input_batch.idx_mapping_np[index])
        first = int(input_batch.num_computed_prefill_tokens_np[index])
        count = int(input_batch.num_scheduled_tokens[index])
        offset = int(input_batch.query_start_loc_np[index])

        def tokens(positions_S: NDArray[np.int64]) -> Tensor:
            return all_token_ids[
                state, torch.from_numpy(positions_S).to(all_token_ids.device)
            ].long()

        return Computed(
            request, first, min(count, int(prompt_lens[state]) - 1 - first), offset, tokens
        )
