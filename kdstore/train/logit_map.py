"""What a model does to the logits of its output layer, found by trying.

Some architectures scale them (Cohere, Granite), some cap them softly (Gemma). The names in their
configurations differ, so the output layer is made to answer known numbers, and the model's logits
say what became of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from kdstore.errors import UsageError
from kdstore.teachers.probe import close, probe_ids, probing

if TYPE_CHECKING:
    from torch import nn

_SMALL = 2.0**-10
_HUGE = 1e6
_GRID = (_SMALL, _HUGE, 1.0, -1.0, 7.0, -30.0, 100.0, -1000.0)  # as many as probe tokens


@dataclass(frozen=True)
class LogitMap:
    """logits = cap · tanh(scale · z / cap), without a cap scale · z; -inf from ``num_ids`` on."""

    scale: float = 1.0
    cap: float | None = None
    num_ids: int | None = None

    def apply_(self, answers: Tensor) -> Tensor:
        """The logits of the output layer's answers [..., V], in their place."""
        if self.scale != 1:
            answers.mul_(self.scale)
        if self.cap is not None:
            answers.div_(self.cap).tanh_().mul_(self.cap)
        if self.num_ids is not None:
            answers[..., self.num_ids :] = -torch.inf
        return answers

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient for the output layer's answers, in the place of that for the logits."""
        if self.cap is not None:
            grad.mul_(1 - (logits / self.cap).square_())
        if self.num_ids is not None:
            grad[..., self.num_ids :] = 0
        return grad if self.scale == 1 else grad.mul_(self.scale)


@torch.no_grad()
def measure_logit_map(model: Any, layer: nn.Linear) -> LogitMap:
    """How ``model`` turns the answers of its output layer into logits.

    Raises UsageError if that is no scale and soft cap, or if the layer is not called as expected.
    """
    with probing(model):
        return _measure(model, layer)


def _measure(model: Any, layer: nn.Linear) -> LogitMap:
    ids = probe_ids(model.device)
    asked: list[Tensor] = []
    with layer.register_forward_hook(
        # Not its answer: other hooks on the layer, which the head does not have, may change that.
        lambda _module, args, _answer: asked.append(linear(args[0], layer.weight, layer.bias))
    ):
        whole = model(input_ids=ids, use_cache=False).logits[0]
    if len(asked) != 1 or asked[0].shape[-2:] != whole.shape:
        raise unfit(model, f"{len(asked)} calls of the output layer")
    grid = torch.tensor(_GRID, device=whole.device)
    answer = grid[None, :, None].expand(1, -1, whole.shape[1])
    with layer.register_forward_hook(lambda *_: answer.clone()):
        found = model(input_ids=ids, use_cache=False).logits[0].float()
    logit_map = _fit(model, found[:, 0])
    expected = logit_map.apply_(grid.clone())
    same = torch.isclose(found, expected[:, None], rtol=1e-2 if _is_coarse(whole) else 1e-4)
    if not same.all() or not close(logit_map.apply_(asked[0][0].float()), whole):
        raise unfit(model, "its logits are no scaled and capped answers of the output layer")
    return logit_map


def _fit(model: Any, found: Tensor) -> LogitMap:
    scale = found[0].item() / _SMALL
    if not scale > 0:
        raise unfit(model, f"a scale of {scale}")
    capped = found[1].item() < scale * _HUGE / 2
    return LogitMap(scale, found[1].item() if capped else None)


def _is_coarse(logits: Tensor) -> bool:
    return logits.dtype in (torch.bfloat16, torch.float16)


def unfit(model: Any, why: str) -> UsageError:
    """The refusal of a model by the fused head."""
    return UsageError(
        "the fused head does not fit this model",
        where=type(model).__name__,
        expected="a plain nn.Linear as output layer, whose answers are at most scaled and capped",
        got=why,
        todo="set fused to false, or leave the output layer out of the adapter's target modules",
    )
