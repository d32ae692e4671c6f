"""Each measure against a naive float64 reference, and against the mean of many draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdstore.codecs import IdOrder, Positions, codec_for
from kdstore.hashing import RowKeys
from kdstore.readers.measures import (
    angle_degrees,
    expected_relative_error,
    quantisation_kl,
    relative_error,
    squared_error,
    truncation_kl,
)
from kdstore.select import parse_selection, select
from kdstore.signal import SparseSignal
from tests.select.dense import logits_of, softmax

V = 24
DRAWS = 4000
LIMIT = 5.0  # standard errors


def some_logits(count: int) -> torch.Tensor:
    return 2 * torch.randn(count, V, generator=torch.Generator().manual_seed(2))


def decoded(logits: torch.Tensor, spec: str) -> SparseSignal:
    """What a store gives back of one draw for each row of logits."""
    count = len(logits)
    keys = RowKeys(0, np.arange(count, dtype=np.uint64), np.full(count, 3, dtype=np.int64))
    labels = torch.zeros(count, dtype=torch.long)
    signal = select(logits, labels, selection=parse_selection(spec), keys=keys, scalars=())
    codec = codec_for(signal.selection, order=IdOrder.identity(logits.shape[1]), scalars=())
    positions = Positions(keys, np.array([0, count]), np.zeros(count, dtype=np.int32))
    return codec.decode(codec.encode(signal, positions), positions.previous_S)


def entries_of(signal: SparseSignal, row: int) -> dict[int, float]:
    one = signal[row : row + 1]
    return dict(zip(one.ids_N.tolist(), np.exp(one.logprobs_N.astype(float)).tolist(), strict=True))


def kl_over_outcomes(teacher: list[float], entries: dict[int, float], rest: float) -> float:
    kept = [(teacher[i], q) for i, q in entries.items()]
    left = sum(p for i, p in enumerate(teacher) if i not in entries)
    return sum(p * math.log(p / q) for p, q in [*kept, (left, rest)] if p > 0)


@pytest.mark.parametrize("spec", ["topk:k=5", "topp:p=0.8", "full"])
def test_divergences_equal_the_reference(spec: str) -> None:
    logits = some_logits(12)
    signal, teacher_CV = decoded(logits, spec), softmax(logits)
    quantisation, truncation = (f(signal, teacher_CV) for f in (quantisation_kl, truncation_kl))
    for row, teacher in enumerate(teacher_CV.tolist()):
        entries = entries_of(signal, row)
        want = kl_over_outcomes(teacher, entries, math.exp(signal.rest_S[row]))
        assert quantisation[row] == pytest.approx(want, abs=1e-12)
        kept = sum(teacher[i] for i in entries)
        renormalised = {i: teacher[i] / kept for i in entries}
        want = sum(p * math.log(p / teacher[i]) for i, p in renormalised.items())
        assert truncation[row] == pytest.approx(want, abs=1e-12)
    if spec == "full":
        assert np.abs(quantisation).max() < 1e-5
        assert truncation.max() < 1e-12
    else:
        assert 1e-6 < quantisation.mean() < 1e-3
        assert truncation.min() > 0.001


def test_an_unrounded_signal_has_no_quantisation() -> None:
    logits = some_logits(8)
    keys = RowKeys(0, np.arange(8, dtype=np.uint64), np.arange(8))
    signal = select(
        logits, torch.zeros(8, dtype=torch.long), selection=parse_selection("topk:k=4"), keys=keys
    )
    assert np.abs(quantisation_kl(signal, softmax(logits))).max() < 1e-6


def test_a_certain_teacher_loses_nothing() -> None:
    logits = logits_of([1.0], V)
    signal = decoded(logits, "topk:k=2")
    assert quantisation_kl(signal, softmax(logits)).tolist() == pytest.approx([0], abs=1e-6)
    assert truncation_kl(signal, softmax(logits)).tolist() == [0]


@pytest.mark.parametrize("spec", ["pps:tau=0.1", "counts:n=7"])
def test_errors_equal_the_reference(spec: str) -> None:
    logits = some_logits(12)
    signal, teacher_CV = decoded(logits, spec), softmax(logits)
    squared, relative = (f(signal, teacher_CV) for f in (squared_error, relative_error))
    for row, teacher in enumerate(teacher_CV.tolist()):
        entries = entries_of(signal, row)
        errors = [(entries.get(i, 0.0) - p) ** 2 for i, p in enumerate(teacher)]
        assert squared[row] == pytest.approx(sum(errors))
        assert relative[row] == pytest.approx(
            sum(error / p for error, p in zip(errors, teacher, strict=True))
        )


ROWS = {
    "head and tail": logits_of([0.4, 0.25, *[0.35 / 22] * 22], V),
    "no head": torch.linspace(0, 1, V)[None],
    "half of the tokens impossible": logits_of([0.5, *[0.5 / 11] * 11], V),
    "tail of 1e-4": logits_of([0.7, 0.2999, *[1e-4 / 22] * 22], V),
}


def draws(name: str, spec: str) -> tuple[SparseSignal, NDArray[np.float64]]:
    logits = ROWS[name].repeat(DRAWS, 1)
    return decoded(logits, spec), softmax(logits)


def standard_errors(values: NDArray[np.float64], want: float) -> float:
    """How far the mean of draws is from what it should be; rounding of float32 does not count."""
    return float(abs(values.mean() - want) / max(values.std() / np.sqrt(len(values)), 1e-6))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("spec", ["pps:tau=0.1", "pps:tau=0.03", "counts:n=20"])
def test_the_expected_error_is_the_mean_of_many_draws(spec: str, name: str) -> None:
    signal, teacher_CV = draws(name, spec)
    expected = expected_relative_error(signal, teacher_CV)
    measured = relative_error(signal, teacher_CV)
    assert standard_errors(measured - expected, 0.0) < LIMIT
    assert expected.std() <= measured.std() + 1e-9


@pytest.mark.parametrize("name", ROWS)
def test_counts_have_the_errors_of_multinomial_rounds(name: str) -> None:
    n = 20
    signal, teacher_CV = draws(name, f"counts:n={n}")
    want = (1 - np.square(teacher_CV[0]).sum()) / n
    assert standard_errors(squared_error(signal, teacher_CV), want) < LIMIT
    support = int((teacher_CV[0] > 0).sum())
    np.testing.assert_allclose(expected_relative_error(signal, teacher_CV), (support - 1) / n)


def test_pps_has_the_errors_of_its_inclusion_probabilities() -> None:
    """Without a head each token is drawn with probability t / w: Var = t (w - t)."""
    signal, teacher_CV = draws("no head", "pps:tau=0.1")
    t, weight = teacher_CV[0], 0.1
    assert standard_errors(squared_error(signal, teacher_CV), (t * (weight - t)).sum()) < LIMIT
    expected = expected_relative_error(signal, teacher_CV)
    np.testing.assert_allclose(expected, (weight - t).sum(), rtol=1e-5)


def test_angles() -> None:
    one = np.array([1.0, 0.0, 0.0])
    assert angle_degrees(one, np.array([0.0, 2.0, 0.0])) == pytest.approx(90)
    assert angle_degrees(one, -3 * one) == pytest.approx(180)
    assert angle_degrees(one, np.array([1.0, 1e-9, 0.0])) == pytest.approx(math.degrees(1e-9))
