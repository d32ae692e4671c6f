"""The tap on vLLM's V1 model runner (``v1/worker/gpu_model_runner.py``, and its CPU kin).

Once a step, after sampling, the runner asks itself for prompt log-probabilities; it has the step's
hidden states then, and knows how far each request was before it. The tap looks on there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdstore.teachers.vllm.request import TapRequest
from kdstore.teachers.vllm.tap import Computed, Tap

METHOD = "_get_prompt_logprobs_dict"
PARAMETERS = ("hidden_states", "num_scheduled_tokens")
_KNOWN = "kdstore_sequence"  # the attribute of a request's state that keeps what was read of it


@dataclass(frozen=True, eq=False)
class _Sequence:
    """A request of the engine: what it asks of the tap, and its tokens."""

    request: TapRequest | None
    prompt_T: NDArray[np.int64]
    generated: list[int]  # the runner's own list, which grows

    @classmethod
    def of_state(cls, state: Any) -> Self:
        """Read from the runner's state of a request, once."""
        known = vars(state).get(_KNOWN)
        if known is None:
            request = TapRequest.of_extra_args(getattr(state.sampling_params, "extra_args", None))
            prompt = np.array(state.prompt_token_ids if request else [], np.int64)
            known = cls(request, prompt, state.output_token_ids)
            setattr(state, _KNOWN, known)
        return known  # type: ignore[no-any-return]

    def tokens(self, positions_S: NDArray[np.int64]) -> Tensor:
        """int64: the tokens at some ascending positions."""
        split = np.searchsorted(positions_S, len(self.prompt_T))
        later = [self.generated[position - len(self.prompt_T)] for position in positions_S[split:]]
        return torch.from_numpy(
            np.concatenate([self.prompt_T[positions_S[:split]], np.array(later, np.int64)])
        )


class RunnerV1:
    """Tells the tap what each step of a V1 runner computed."""

    def __init__(self, runner: Any, tap: Tap) -> None:
        self._runner, self._tap = runner, tap
        self._ask_runner = getattr(runner, METHOD)
        setattr(runner, METHOD, self._step)

    def _step(self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        found = (self._computed(name, count) for name, count in num_scheduled_tokens.items())
        self._tap.step(hidden_states, [computed for computed in found if computed is not None])
        return self._ask_runner(hidden_states, num_scheduled_tokens)

    def _computed(self, name: str, count: int) -> Computed | None:
        state = self._runner.requests[name]
        sequence = _Sequence.of_state(state)
        if sequence.request is None:
            return None
        index = self._runner.input_batch.req_id_to_index[name]
        offset = int(self._runner.query_start_loc.np[index])
        known = len(sequence.prompt_T) + len(sequence.generated)
        first = state.num_computed_tokens
        count = min(count, known - 1 - first)  # the row of the last token answers none
        return Computed(sequence.request, first, count, offset, sequence.tokens)
