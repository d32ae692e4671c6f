"""Losses on sparse teacher signals: functions, and by name in `LOSSES` the classes behind them.

Each takes `(logits, batch, *, reduction="mean", denominator=None)` and options of its own: the
student's logits `[B, L, V]` or `[T, V]` and the Batch they were computed from. A new loss is one
new file here and one line in `LOSSES`.
"""

from __future__ import annotations

from kdstore.train.losses.base import Loss, Reduction
from kdstore.train.losses.ce import CE, ce
from kdstore.train.losses.forward_kl import ForwardKL, forward_kl
from kdstore.train.losses.hinge import Hinge, hinge
from kdstore.train.losses.jsd import JSD, jsd
from kdstore.train.losses.logistic_ranking import LogisticRanking, logistic_ranking
from kdstore.train.losses.policy_gradient import PolicyGradient, policy_gradient
from kdstore.train.losses.reverse_kl import ReverseKL, reverse_kl
from kdstore.train.losses.skew_kl import SkewKL, skew_kl
from kdstore.train.losses.skew_reverse_kl import SkewReverseKL, skew_reverse_kl
from kdstore.train.losses.tvd import TVD, tvd

LOSSES: dict[str, type[Loss]] = {
    cls.name: cls
    for cls in (
        *(ForwardKL, ReverseKL, JSD, SkewKL, SkewReverseKL, TVD),
        *(Hinge, LogisticRanking, PolicyGradient, CE),
    )
}

__all__ = [
    "LOSSES",
    "Loss",
    "Reduction",
    "ce",
    "forward_kl",
    "hinge",
    "jsd",
    "logistic_ranking",
    "policy_gradient",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
]
