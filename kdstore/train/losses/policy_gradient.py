"""The policy gradient of the reverse KL, on sampled tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdstore.errors import SignalError, UsageError
from kdstore.train.losses.base import Loss, function_of
from kdstore.train.losses.student import Reading, Student

if TYPE_CHECKING:
    from kdstore.signal import TorchSignal


# e^80 is finite in float32, and its product with any advantage; a token that was drawn is nowhere
# near it.
LARGEST_LOG_RATIO = 80.0


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Loss):
    """-ρ A per token, with A = log t - log s held constant and ρ = s / s_behaviour.

    The labels were drawn from the student as it was, with the log-probabilities in the scalar
    ``behaviour_logprob``. Unclipped, its gradient over such draws is that of KL(s || t) (the
    policy gradient theorem; for distillation MiniLLM, arXiv:2306.08543, section 2.2). ``clip`` is
    PPO's (arXiv:1707.06347, equation 7): the larger of -ρ A and -clip(ρ, 1 ± clip) A; None is none.

    ``on_policy`` takes the labels for draws of the student as it is now: ρ is 1 then, and no
    ``behaviour_logprob`` is needed.

    >>> from kdstore.testing.batch import one_position
    >>> batch = one_position([1.0], label=2, label_logprob=0.0, behaviour_logprob=-1.386294)
    >>> round(policy_gradient(torch.zeros(1, 2, 4), batch).item(), 4)
    -1.3863
    """

    name = "policy_gradient"
    uses_entries = False
    clip: float | None = 0.2
    on_policy: bool = False

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise UsageError(
                "a clip is positive", where="policy_gradient.clip", expected="> 0", got=self.clip
            )

    def reading(self, signal: TorchSignal) -> Reading:
        """The labels; SignalError without the scalars."""
        needed = ["label_logprob"] if self.on_policy else ["label_logprob", "behaviour_logprob"]
        missing = [name for name in needed if name not in signal.scalars]
        if missing:
            raise SignalError(
                f"policy_gradient needs the scalar {missing[0]}",
                where=f"signal {signal.selection}",
                expected=", ".join(needed),
                got=", ".join(signal.scalars) or "no scalars",
                todo="record rollouts with behaviour_logprob; on_policy=True takes the labels for "
                "draws of the student as it is",
            )
        return Reading(labels=True)

    def terms(self, student: Student, signal: TorchSignal) -> Tensor:
        """[S]: the clipped surrogate."""
        log_s = student.log_label_S
        old = log_s.detach()
        advantage = signal.scalars["label_logprob"].to(log_s.dtype) - old
        behaviour = old if self.on_policy else signal.scalars["behaviour_logprob"].to(log_s.dtype)
        ratio = (log_s - behaviour).clamp(max=LARGEST_LOG_RATIO).exp()
        clip = math.inf if self.clip is None else self.clip
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


policy_gradient = function_of(PolicyGradient)
