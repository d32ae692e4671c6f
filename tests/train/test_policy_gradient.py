"""policy_gradient: over the behaviour's draws its gradient is that of the dense reverse KL."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdstore.errors import SignalError
from kdstore.signal import SparseSignal
from kdstore.train.losses import policy_gradient
from tests.train.train_helpers import V, log_softmax, one_sample_batch

RNG = np.random.default_rng(0)
TEACHER = log_softmax(2 * RNG.normal(size=V))
STUDENT = torch.from_numpy(RNG.normal(size=V))


def every_label(behaviour: np.ndarray | None) -> object:
    """A batch whose V positions have each token once as the label."""
    scalars = {"label_logprob": TEACHER}
    if behaviour is not None:
        scalars["behaviour_logprob"] = behaviour
    signal = SparseSignal.from_arrays(
        "topk:k=1", range(V + 1), np.zeros(V), np.log(np.full(V, 0.5)), scalars=scalars
    )
    return one_sample_batch(signal, np.arange(V))


def reverse_kl_grad() -> torch.Tensor:
    logits = STUDENT.clone().requires_grad_()
    log_s = torch.log_softmax(logits, 0)
    (log_s.exp() * (log_s - torch.from_numpy(TEACHER))).sum().backward()
    return logits.grad


@pytest.mark.parametrize("on_policy", [True, False])
def test_expected_gradient_is_that_of_the_reverse_kl(on_policy):
    """Drawn from the student itself, or from another policy and weighted by s / behaviour."""
    behaviour = log_softmax(STUDENT.numpy() if on_policy else RNG.normal(size=V))
    batch = every_label(None if on_policy else behaviour)
    logits = STUDENT.repeat(V + 1, 1).requires_grad_()
    each = policy_gradient(logits, batch, clip=None, on_policy=on_policy, reduction="none")
    (each * torch.from_numpy(behaviour).exp()).sum().backward()
    torch.testing.assert_close(logits.grad.sum(0), reverse_kl_grad(), rtol=0, atol=1e-6)


def test_the_clip_holds_back_only_what_goes_further():
    """Above 1 + clip a token that the teacher likes gets no gradient; one it dislikes does."""
    log_s = torch.log_softmax(STUDENT, 0).numpy()
    liked, logits = log_s < TEACHER, STUDENT.repeat(V + 1, 1).requires_grad_()
    policy_gradient(logits, every_label(log_s - 1.0), reduction="sum").backward()
    moved = logits.grad[:V].abs().amax(1).numpy() > 0
    assert moved.tolist() == (~liked).tolist()


@pytest.mark.parametrize("missing", ["label_logprob", "behaviour_logprob"])
def test_missing_scalars_are_refused(missing):
    scalars = {"label_logprob": [-1.0], "behaviour_logprob": [-1.0]}
    del scalars[missing]
    signal = SparseSignal.from_arrays("topk:k=1", [0, 1], [0], [0.0], scalars=scalars)
    with pytest.raises(SignalError, match=f"needs the scalar {missing}(.|\n)*behaviour_logprob"):
        policy_gradient(torch.zeros(2, V), one_sample_batch(signal))
