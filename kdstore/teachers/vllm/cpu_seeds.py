"""Requests with a seed on vLLM's CPU build.

Where a chunk of a prompt ends before the prompt does, vLLM draws a token all the same and then sets
the request's generator back by that draw. torch's generators of a CPU cannot do that, and the
engine dies. So each such request gets one that can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

METHOD = "_update_states"  # of the runner: once a step, before it draws


class RewindingGenerator(torch.Generator):
    """A generator that goes back to where it was when the step began."""

    start: Tensor

    @classmethod
    def like(cls, fresh: torch.Generator) -> RewindingGenerator:
        """With the seed of a generator that nothing was drawn from."""
        generator = cls()
        generator.manual_seed(fresh.initial_seed())
        return generator

    def get_offset(self) -> int:
        """Nothing is known of it."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Back to the start of the step: a step draws once."""
        del offset
        return self.set_state(self.start)


def rewind_generators(runner: Any) -> None:
    """Let a V1 runner of a CPU set its generators back."""
    update = getattr(runner, METHOD)

    def updated(scheduler_output: Any) -> Any:
        answer = update(scheduler_output)
        batch = runner.input_batch
        for index, generator in list(batch.generators.items()):
            if not isinstance(generator, RewindingGenerator):
                generator = RewindingGenerator.like(generator)
                batch.generators[index] = generator
                runner.requests[batch.req_ids[index]].generator = generator
            generator.start = generator.get_state()
        return answer

    setattr(runner, METHOD, updated)
