"""Every loss against its dense float64 reference, at the edges, and as part of a batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdstore.errors import SignalError, UsageError
from kdstore.readers.collate import Collator
from kdstore.signal import NO_ENTRIES, SparseSignal
from kdstore.train.losses import LOSSES, pairs, student
from tests.train.dense_losses import ALL, DIVERGENCES, Case, reference, topk_mask
from tests.train.train_helpers import V, one_sample_batch, pps_signal, ragged_samples, tiny_model

S = 6
OUTSIDE = ("rest", "renormalize", "truncate")


def make_case(seed: int = 0, k: int = 3) -> Case:
    rng = np.random.default_rng(seed)
    teacher = 2 * rng.normal(size=(S, V)).astype(np.float32).astype(np.float64)
    return Case(teacher, topk_mask(teacher, k), rng.integers(0, V, S))


def ragged_case(seed: int = 0) -> Case:
    """From no entry at all, and one, to the whole vocabulary."""
    case = make_case(seed)
    keep = np.stack([topk_mask(case.teacher, k)[row] for row, k in enumerate((0, 1, 2, 5, 9, V))])
    return replace(case, keep=keep, selection="topp:p=0.9,max_k=11")


def student_logits(seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(
        2 * np.random.default_rng(seed).normal(size=(S + 1, V))
    ).requires_grad_()


def assert_like_dense(name, case, *, temperature=1.0, outside="rest", **options):
    logits = student_logits()
    shared = dict(options)
    if name in DIVERGENCES:
        shared |= {"temperature": temperature, "outside": outside}
    temperatures = (temperature,) if temperature != 1 else ()
    found = LOSSES[name](**shared)(logits, case.batch(temperatures=temperatures), reduction="none")
    expected = reference(
        name, logits[:S], case, temperature=temperature, outside=outside, **options
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)
    weights = torch.linspace(0.5, 2, S, dtype=torch.float64)
    grads = [torch.autograd.grad((one * weights).sum(), logits)[0] for one in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=3e-6)


@pytest.fixture(params=[False, True], ids=["one block", "blocks of two rows"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(student, "BLOCK_ELEMENTS", 2 * V)
        monkeypatch.setattr(pairs, "BLOCK_ELEMENTS", 2 * V)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("case", [make_case(), ragged_case()], ids=["topk", "ragged"])
@pytest.mark.parametrize("name", ALL)
def test_value_and_gradient(name, case):
    assert_like_dense(name, case, **ALL[name])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_outside_and_temperature(name, outside, temperature):
    """T² scales the loss and with it the gradient; renormalised, both sides sum to one."""
    case = make_case(2)
    assert_like_dense(name, case, temperature=temperature, outside=outside, **DIVERGENCES[name])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_k_equal_to_v_is_dense(name, temperature):
    """As topk, whose rest is nothing, and as full, which needs no normaliser at T = 2."""
    for selection in ("topk:k=11", "full"):
        case = replace(make_case(3, k=V), selection=selection)
        logits = student_logits()
        loss = LOSSES[name](**DIVERGENCES[name], temperature=temperature)
        temperatures = (temperature,) if selection != "full" and temperature != 1 else ()
        found = loss(logits, case.batch(temperatures=temperatures), reduction="none")
        expected = reference(name, logits[:S], case, temperature=temperature, **DIVERGENCES[name])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_nothing_to_learn_from_oneself(name, temperature):
    """Student == teacher: loss and gradient are zero, with the rest as one more outcome."""
    case = ragged_case(4)
    logits = torch.from_numpy(np.vstack([case.teacher, np.zeros((1, V))])).requires_grad_()
    loss = LOSSES[name](**DIVERGENCES[name], temperature=temperature)
    batch = case.batch(temperatures=(temperature,) if temperature != 1 else ())
    each = loss(logits, batch, reduction="none")
    torch.testing.assert_close(each, torch.zeros_like(each), rtol=0, atol=1e-6)
    if name != "tvd":  # the distance has a kink there
        (grad,) = torch.autograd.grad(each.sum(), logits)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"policy_gradient"}))
def test_gradcheck(name):
    """Away from kinks. The policy gradient holds its advantage constant, so it is no gradient."""
    loss, batch = LOSSES[name](**ALL[name]), ragged_case(5).batch()
    assert torch.autograd.gradcheck(lambda x: loss(x, batch), student_logits(6))


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("name", ALL)
def test_extreme_logits_are_finite(name, scale):
    for case in (make_case(7), ragged_case(7), replace(make_case(7, k=V), selection="full")):
        raw = torch.zeros(S + 1, V)
        raw[:, ::3] = scale
        raw[::2, 1] = -scale
        raw.requires_grad_()
        loss = LOSSES[name](**ALL[name])(raw, case.batch())
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(raw.grad).all()


@pytest.mark.parametrize("name", ALL)
def test_a_vocabulary_that_is_masked(name):
    """Logits of -inf, at entries and outside them, next to a row that has all of its own."""
    case = make_case(8)
    raw = student_logits().detach().float()
    raw[0, ~torch.from_numpy(case.keep[0])] = -torch.inf
    raw[1, int(np.flatnonzero(case.keep[1])[0])] = -torch.inf
    raw.requires_grad_()
    labels = case.teacher.argmax(1)
    labels[1] = np.flatnonzero(case.keep[1])[1]
    batch = replace(case, labels=labels).batch()
    each = LOSSES[name](**ALL[name])(raw, batch, reduction="none")
    (each[0] + each[2:].sum()).backward()
    assert torch.isfinite(raw.grad).all()
    assert torch.isfinite(each[[0, 2, 3, 4, 5]]).all()


@pytest.mark.parametrize("name", ALL)
def test_no_position_is_scored(name):
    scalars = {"label_logprob": [], "behaviour_logprob": []}
    signal = SparseSignal.from_arrays("topk:k=2", [0], [], [], scalars=scalars)
    logits = torch.full((1, 1, V), torch.inf, requires_grad=True)
    loss = LOSSES[name](**ALL[name])(logits, one_sample_batch(signal))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.tolist() == torch.zeros(1, 1, V).tolist()


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_logits_are_summed_in_float32(name):
    case = make_case(9)
    half = (student_logits().detach() + 30).bfloat16()
    exact = half.double().requires_grad_()
    half.requires_grad_()
    loss = LOSSES[name](**ALL[name])
    found, expected = loss(half, case.batch()), loss(exact, case.batch())
    found.backward()
    expected.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_padded_packed_and_single_samples_agree(name):
    """Ragged lengths, masked prompts, samples without a position: the same loss three ways."""
    samples = [topk_sample(sample) for sample in ragged_samples(9)]
    model, values = tiny_model(), []
    for batches in (
        [Collator()(samples)],
        [Collator(pack=True)(samples)],
        [Collator()([sample]) for sample in samples],
    ):
        count = sum(len(batch.signal) for batch in batches)
        each = [
            LOSSES[name](**ALL[name])(
                model(**batch.model_inputs()).logits, batch, denominator=count
            )
            for batch in batches
        ]
        values.append(torch.stack(each).sum().item())
    assert abs(values[0]) > 0.02
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-5, abs=1e-6)


def topk_sample(sample):
    """The sample with a topk signal of a random teacher of its own."""
    rng = np.random.default_rng(int(sample.sample_id[1:]))
    teacher = 2 * rng.normal(size=(sample.num_scored, V))
    labels = sample.input_ids_T[sample.positions_S].astype(np.int64)
    return replace(sample, signal=Case(teacher, topk_mask(teacher, 3), labels).signal())


@pytest.mark.parametrize("name", sorted(set(ALL) - {"forward_kl", "ce", "policy_gradient"}))
def test_drawn_signals_are_refused(name):
    rng = np.random.default_rng(0)
    signal = pps_signal(rng.normal(size=(S, V)), rng)
    with pytest.raises(UsageError, match=f"{name} of a drawn target is biased"):
        LOSSES[name](**ALL[name])(student_logits(), one_sample_batch(signal))


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"forward_kl"}))
def test_drawn_signals_are_taken_for_the_teacher_if_told_so(name):
    rng = np.random.default_rng(0)
    signal = pps_signal(rng.normal(size=(S, V)), rng)
    whole = SparseSignal.from_arrays(
        "topk:k=11", signal.indptr, signal.ids_N, signal.logprobs_N, rest_S=signal.rest_S
    )
    loss = LOSSES[name](**DIVERGENCES[name], allow_sampled=True)
    values = [loss(student_logits(), one_sample_batch(one)).item() for one in (signal, whole)]
    assert values[0] == values[1]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_temperatures_that_the_store_lacks_are_refused(name):
    case, logits = make_case(), student_logits()
    for outside in ("rest", "truncate"):
        loss = LOSSES[name](temperature=2.0, outside=outside)
        with pytest.raises(SignalError, match=r"lse_T2\n(.|\n)*--temperatures 2"):
            loss(logits, case.batch(temperatures=(1.5,)))


def test_drawn_signals_have_one_temperature():
    rng = np.random.default_rng(0)
    signal = pps_signal(rng.normal(size=(S, V)), rng)
    with pytest.raises(UsageError, match=r"temperature=1\n  got: temperature=2"):
        LOSSES["forward_kl"](temperature=2.0)(student_logits(), one_sample_batch(signal))
    tempered = replace(signal, selection="pps:tau=0.1,temperature=2.0")
    with pytest.raises(UsageError, match=r"temperature=2\n  got: temperature=1"):
        LOSSES["forward_kl"]()(student_logits(), one_sample_batch(tempered))
    logits = student_logits()
    found = LOSSES["forward_kl"](temperature=2.0)(
        logits, one_sample_batch(tempered), reduction="none"
    )
    log_s = torch.log_softmax(logits[:S] / 2, 1)
    cross = -(torch.from_numpy(signal.to_dense(V)) * log_s).sum(1)
    expected = 4 * (cross - torch.from_numpy(signal.scalars["entropy"]).double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_drawn_signals_have_no_outside():
    rng = np.random.default_rng(0)
    batch = one_sample_batch(pps_signal(rng.normal(size=(S, V)), rng))
    with pytest.raises(UsageError, match="nothing outside its entries"):
        LOSSES["forward_kl"](outside="truncate")(student_logits(), batch)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"ce", "policy_gradient"}))
def test_signals_without_entries_are_refused(name):
    signal = SparseSignal.from_arrays(NO_ENTRIES, [0] * (S + 1), [], [])
    with pytest.raises(UsageError, match="were not read"):
        LOSSES[name](**ALL[name])(student_logits(), one_sample_batch(signal))


@pytest.mark.parametrize("name", sorted(set(ALL) - {"ce", "policy_gradient"}))
def test_ids_beyond_the_student_are_refused(name):
    signal = SparseSignal.from_arrays("topk:k=1", [0, 1], [V], [np.log(0.5)], rest_S=[np.log(0.5)])
    with pytest.raises(SignalError, match=rf"from 0 to {V - 1}\n  got: {V}\n  to do: train"):
        LOSSES[name](**ALL[name])(torch.zeros(2, V), one_sample_batch(signal))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("forward_kl", {"temperature": 0.0}, "a temperature is positive"),
        ("forward_kl", {"temperature": float("nan")}, "a temperature is positive"),
        ("reverse_kl", {"outside": "drop"}, "unknown way to treat the mass outside"),
        ("jsd", {"beta": 1.5}, "a share is from 0 to 1"),
        ("skew_kl", {"alpha": -0.1}, "a share is from 0 to 1"),
        ("skew_reverse_kl", {"alpha": 2}, "a share is from 0 to 1"),
        ("policy_gradient", {"clip": 0.0}, "a clip is positive"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        LOSSES[name](**options)


def test_ends_of_the_generalised_divergences():
    """β = 0 and α = 0 are the plain divergences; β = 1 is the reverse one."""
    case, logits = make_case(11), student_logits()
    values = {
        name: LOSSES[loss](**options)(logits, case.batch()).item()
        for name, loss, options in [
            ("forward", "forward_kl", {}),
            ("jsd 0", "jsd", {"beta": 0.0}),
            ("skew 0", "skew_kl", {"alpha": 0.0}),
            ("reverse", "reverse_kl", {}),
            ("jsd 1", "jsd", {"beta": 1.0}),
            ("skew reverse 0", "skew_reverse_kl", {"alpha": 0.0}),
        ]
    }
    assert values["forward"] == values["jsd 0"] == values["skew 0"]
    assert values["reverse"] == values["jsd 1"] == values["skew reverse 0"]
    assert values["forward"] != values["reverse"]
