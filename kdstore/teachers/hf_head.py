"""Body and head of a transformers causal LM, run apart.

A head over all positions of a batch is what fills memory: 16k positions of 152k logits are 10 GB.
So the body runs once, and the head over chunks of scored positions. The head is whatever the
model's own forward does after its body (bias, scale, soft cap): the body is swapped for a stand-in
that hands back given hidden states, so no architecture's head is written again here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdstore.errors import TeacherError
from kdstore.teachers.probe import close, is_causal, probe_ids


class _GivenOutput:
    """What a body returns, with hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class _GivenBody(nn.Module):
    """A stand-in for the body that ignores its input."""

    hidden: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> _GivenOutput:
        return _GivenOutput(self.hidden)


class SplitModel:
    """A causal LM as ``hidden(input_ids)`` and ``logits(hidden_rows)``.

    Raises TeacherError when the parts do not give what the whole gives on a probe.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.body = model.base_model
        self._given = _GivenBody()
        self._check()

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return torch.device(self.model.device)

    def hidden(self, input_ids_BL: Tensor) -> Tensor:
        """Hidden states [B, L, D]; rows are padded on the right, which a causal body never sees."""
        output = self.body(input_ids=input_ids_BL, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Logits [C, V] of hidden states [C, D], in the dtype the model gives."""
        self._given.hidden = hidden_CD[None]
        dummy = torch.zeros((1, len(hidden_CD)), dtype=torch.long, device=hidden_CD.device)
        with self._swapped():
            logits: Tensor = self.model(input_ids=dummy, use_cache=False).logits[0]
        return logits

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        prefix = self.model.base_model_prefix
        setattr(self.model, prefix, self._given)
        try:
            yield
        finally:
            setattr(self.model, prefix, self.body)

    @torch.inference_mode()
    def _check(self) -> None:
        """Parts against the whole, and a prefix against the prefix of something longer."""
        if self.body is self.model:
            raise self._cannot_split("it has no body of its own")
        ids = probe_ids(self.device)
        whole = self.model(input_ids=ids, use_cache=False).logits[0]
        try:
            parts = self.logits(self.hidden(ids)[0])
        except (AttributeError, TypeError) as error:
            raise self._cannot_split(f"its forward does more than that ({error})") from error
        if not close(parts, whole):
            raise self._cannot_split("other logits")
        if not is_causal(self.model):
            raise TeacherError(
                "the teacher is not causal: later tokens change its answers to earlier ones",
                where=type(self.model).__name__,
                expected="a causal language model",
                got=getattr(self.model.config, "model_type", None),
                todo="use a decoder, or set is_decoder in its config.json if it is one",
            )

    def _cannot_split(self, why: str) -> TeacherError:
        return TeacherError(
            "the teacher's head cannot be run apart from its body",
            where=type(self.model).__name__,
            expected="a causal LM whose forward applies its head to the hidden states of its body",
            got=why,
            todo="report the architecture; a teacher class of its own can score it",
        )
