"""Weighted sums of losses: their value and gradient, schedules, teachers, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdstore.errors import SignalError, UsageError
from kdstore.readers.collate import Answers
from kdstore.train.losses import LOSSES
from kdstore.train.objective import Objective
from kdstore.train.schedule import Schedule
from tests.train.test_losses import make_case, student_logits

LOSS_SPECS = {
    "forward_kl": 0.7,
    "ce": {"weight": 0.3},
    "jsd": {"weight": 2.0, "beta": 0.1, "temperature": 2.0},
    "warm": {"loss": "forward_kl", "weight": 0.5, "temperature": 2.0},
    "hinge": {"weight": 0.0},
}


def test_is_the_sum_of_its_losses():
    """Two temperatures, some with the mass outside, some with labels: one reading each."""
    batch, logits = make_case().batch(temperatures=(2.0,)), student_logits()
    objective = Objective(LOSS_SPECS)

    found = objective(logits, batch, denominator=10)

    each = {
        "forward_kl": LOSSES["forward_kl"](),
        "ce": LOSSES["ce"](),
        "jsd": LOSSES["jsd"](beta=0.1, temperature=2.0),
        "warm": LOSSES["forward_kl"](temperature=2.0),
    }
    values = {name: loss(logits, batch, denominator=10) for name, loss in each.items()}
    assert objective.names == list(each)
    assert found.values_n.tolist() == pytest.approx([v.item() for v in values.values()])
    weights = dict(zip(each, (0.7, 0.3, 2.0, 0.5), strict=True))
    expected = torch.stack([weights[name] * value for name, value in values.items()]).sum()
    torch.testing.assert_close(found.total, expected)
    grads = [torch.autograd.grad(one, logits)[0] for one in (found.total, expected)]
    torch.testing.assert_close(*grads)


def test_token_weights_are_no_part_of_the_denominator():
    batch, logits = make_case().batch(), student_logits()
    plain = Objective({"ce": 1.0})(logits, batch)
    doubled = Objective({"ce": 1.0})(logits, replace(batch, weights_S=2 * batch.weights_S))
    assert doubled.total.item() == pytest.approx(2 * plain.total.item())


def test_schedules_of_weight_and_temperature():
    spec = {
        "forward_kl": {
            "weight": {"start": 1.0, "end": 0.0, "kind": "cosine"},
            "temperature": {"start": 2.0, "end": 1.0},
            "outside": "renormalize",
        }
    }
    batch, logits, objective = make_case().batch(), student_logits(), Objective(spec)
    for progress, weight, temperature in [(0.0, 1.0, 2.0), (0.5, 0.5, 1.5), (1.0, 0.0, 1.0)]:
        found = objective(logits, batch, progress=progress)
        loss = LOSSES["forward_kl"](temperature=temperature, outside="renormalize")
        assert found.values_n[0].item() == pytest.approx(loss(logits, batch).item())
        assert found.total.item() == pytest.approx(weight * found.values_n[0].item())


def test_check_looks_at_temperatures_on_the_way():
    """A store with lse_T2 knows the ends of a schedule from 2 to 1, and nothing between them."""
    signal = make_case().batch(temperatures=(2.0,)).signal
    changing = {"start": 2.0, "end": 1.0, "since": 0.8}
    Objective({"jsd": {"temperature": changing, "outside": "renormalize"}}).check(signal)
    with pytest.raises(SignalError, match=r"expected: the scalar lse_T1\.5"):
        Objective({"jsd": {"temperature": changing}}).check(signal)


def test_two_teachers():
    """A loss that names a teacher reads that teacher's signal, at that teacher's positions."""
    main, other, logits = make_case(0).batch(), make_case(1).batch(), student_logits()
    answers = Answers(other.labels, other.signal, other.logit_rows_S, other.weights_S)
    batch = replace(main, teachers={"second": answers})
    spec = {"b": {"loss": "forward_kl", "teacher": "second", "weight": 0.5}, "forward_kl": 1.0}
    found = Objective(spec)(logits, batch)
    alone = [LOSSES["forward_kl"]()(logits, one).item() for one in (other, main)]
    assert found.values_n.tolist() == pytest.approx(alone)
    assert found.total.item() == pytest.approx(0.5 * alone[0] + alone[1])
    with pytest.raises(UsageError, match="listens to a teacher that the data does not have"):
        Objective(spec)(logits, main)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"forward_lk": 1.0}, "did you mean 'losses.forward_kl'"),
        ({"mine": {"loss": "jds"}}, "did you mean 'losses.jsd'"),
        ({"jsd": {"bta": 0.5}}, "did you mean 'losses.jsd.beta'"),
        ({"jsd": {"beta": "x"}}, "losses.jsd.beta has the wrong type"),
        ({"jsd": {"weight": "x"}}, "losses.jsd.weight has the wrong type"),
        ({"jsd": {"weight": {"start": 1.0}}}, "a schedule has an end"),
        ({"jsd": {"weight": {"start": 1.0, "end": 0.0, "until": 2.0}}}, "over a share of training"),
        ({"jsd": {"weight": float("nan")}}, "not finite"),
        ({"jsd": {"temperature": {"start": 1.0, "end": 0.0}}}, "a temperature is positive"),
        ({"ce": {"temperature": 2.0}}, "unknown key 'losses.ce.temperature'"),
        ({"ce": 0.0}, "no loss to train on"),
        ({}, "no loss to train on"),
    ],
)
def test_wrong_specifications_are_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        Objective(spec)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("linear", [3.0, 3.0, 2.5, 2.0, 1.0, 1.0]),
        ("cosine", [3.0, 3.0, 2 + 0.5**0.5, 2.0, 1.0, 1.0]),
    ],
)
def test_schedule(kind, values):
    schedule = Schedule(start=3.0, end=1.0, kind=kind, since=0.2, until=0.6)
    found = [schedule.at(progress) for progress in (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)]
    assert found == pytest.approx(values)


def test_constant_schedule():
    assert Schedule(start=3.0, kind="constant").at(0.7) == 3.0
