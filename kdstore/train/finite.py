"""Stops a run whose losses, gradients or weights are no longer finite, and says where it began.

Looking at a number on a device waits for it, so losses are looked at where they are logged, before
a checkpoint, and every ``STEPS_UNCHECKED`` steps at the latest; until then the device remembers
which micro-batch was the first. ``run`` is the folder in which errors look for a checkpoint to go
on from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdstore.errors import TrainingError
from kdstore.train.checkpoint import last_checkpoint

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch

STEPS_UNCHECKED = 100
IDS_SHOWN = 4


class LossWatch:
    """Remembers the first micro-batch since the last check whose loss is not finite."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Begin anew: all was finite."""
        self._seen: list[tuple[int, list[str]]] = []
        self._first = torch.full((), torch.iinfo(torch.int64).max, device=self._device)

    def see(self, batch: Batch, loss: Tensor, *, step: int) -> None:
        """Take note of a micro-batch and its loss, without waiting for the device."""
        here = torch.full_like(self._first, len(self._seen))
        self._seen.append((step, batch.sample_ids[:IDS_SHOWN]))
        self._first = torch.where(loss.isfinite(), self._first, self._first.minimum(here))

    def first(self) -> tuple[int, list[str]] | None:
        """Step and first sample ids of that micro-batch; None if all were finite."""
        place = int(self._first)
        return self._seen[place] if place < len(self._seen) else None


def refuse_losses(names: Sequence[str], watch: LossWatch, *, step: int, run: str | None) -> None:
    """TrainingError for losses that are not finite, with the samples they began with."""
    first = watch.first()
    where = f"step {step}, a batch of another rank"
    if first is not None:
        where = f"step {first[0]}, a batch with the samples {', '.join(first[1])}, …"
    raise _diverged(f"the loss {' and '.join(names)} is not finite", where=where, run=run)


def check_gradient(logs: Mapping[str, Any], *, step: int, run: str | None) -> None:
    """TrainingError if the norm of the gradient that is logged is not finite."""
    norm = logs.get("grad_norm")
    if norm is not None and not math.isfinite(norm):
        raise _diverged("the gradient is not finite", where=f"step {step}", run=run)


def weights_not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter that is not finite, of the part that this process has."""
    with torch.no_grad():
        finite = {
            name: getattr(parameter, "_local_tensor", parameter).isfinite().all()
            for name, parameter in model.named_parameters()
        }
        if not finite or bool(torch.stack(list(finite.values())).all()):
            return None
    return next(name for name, value in finite.items() if not value)


def refuse_weights(name: str | None, *, step: int, run: str | None) -> None:
    """TrainingError for weights that are not finite."""
    where = f"step {step}, {name or 'weights of another rank'}"
    raise _diverged("the student has weights that are not finite", where=where, run=run)


def _diverged(what: str, *, where: str, run: str | None) -> TrainingError:
    saved = None if run is None else last_checkpoint(run)
    goes_on = "start again" if saved is None else f"go on from {saved}"
    return TrainingError(
        f"training diverged: {what}",
        where=where,
        expected="finite numbers",
        got="NaN or infinity",
        todo=f"look at those samples, lower the learning rate, and {goes_on}",
    )
