"""Selections against dense float64 references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdstore.errors import TeacherError, UsageError
from kdstore.select import SelectionStats, parse_selection, select
from kdstore.select.pps import split_head
from tests.select.dense import SPECS, hard_rows, keys_for, logits_of, select_rows, softmax

VOCABS = (257, 32_000, 131_073, 151_936, 262_144)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("spec", SPECS)
def test_entries_and_rest_sum_to_one(spec: str, vocab_size: int) -> None:
    for name, logits in hard_rows(vocab_size).items():
        signal = select_rows(logits, spec)
        total = signal.kept_mass_S + np.exp(signal.rest_S.astype(np.float64))
        np.testing.assert_allclose(total, 1, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("spec", SPECS)
def test_entries_are_ascending_distinct_and_possible(spec: str, vocab_size: int) -> None:
    for name, logits in hard_rows(vocab_size).items():
        signal = select_rows(logits, spec)
        rows = signal.rows_N
        assert (np.diff(rows * vocab_size + signal.ids_N) > 0).all(), name
        assert (logits.numpy()[rows, signal.ids_N] > -np.inf).all(), name


def test_topk_keeps_the_largest() -> None:
    logits = torch.randn(6, 100)
    signal, dense = select_rows(logits, "topk:k=5"), softmax(logits)
    want = np.sort(np.argsort(-dense, axis=1)[:, :5], axis=1)
    np.testing.assert_array_equal(signal.ids_N.reshape(6, 5), want)
    np.testing.assert_allclose(
        np.exp(signal.logprobs_N), np.take_along_axis(dense, want, axis=1).ravel(), rtol=1e-5
    )
    left = 1 - np.take_along_axis(dense, want, axis=1).sum(1)
    np.testing.assert_allclose(np.exp(signal.rest_S), left, rtol=1e-4)


def test_rest_of_a_near_certain_position_is_not_one_minus_the_sum() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 3] = 40.0
    signal = select_rows(logits, "topk:k=1")
    want = np.log(999) - np.logaddexp(40.0, np.log(999))
    assert signal.rest_S[0] == pytest.approx(want, abs=1e-5)


def test_topp_is_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.randn(20, 60) * 2
    signal, dense = select_rows(logits, "topp:p=0.8"), softmax(logits)
    for row in range(20):
        ids = signal.ids_N[signal.indptr[row] : signal.indptr[row + 1]]
        ordered = np.sort(dense[row])[::-1].cumsum()
        assert len(ids) == int((ordered < 0.8).sum()) + 1
        assert dense[row, ids].min() >= np.delete(dense[row], ids).max()


def test_topp_keeps_at_least_one_and_at_most_max_k() -> None:
    logits = torch.cat([logits_of([0.99, 0.01], 50), torch.zeros(1, 50)])
    assert select_rows(logits, "topp:p=0.5,max_k=7").entries_S.tolist() == [1, 7]


def test_counts_sum_to_n() -> None:
    signal = select_rows(torch.randn(9, 300), "counts:n=37")
    assert signal.counts_N is not None
    np.testing.assert_array_equal(np.add.reduceat(signal.counts_N, signal.indptr[:-1]), 37)
    np.testing.assert_allclose(np.exp(signal.logprobs_N), signal.counts_N / 37, rtol=1e-6)


@pytest.mark.parametrize("tau", [0.02, 0.06, 0.3, 1.0])
def test_pps_head_is_above_the_tail_weight_and_exact(tau: float) -> None:
    logits = torch.cat([*hard_rows(400).values()])
    dense, signal = softmax(logits), select_rows(logits, f"pps:tau={tau}")
    assert signal.tail_N is not None
    p = dense[signal.rows_N, signal.ids_N]
    weights = np.exp(signal.logprobs_N.astype(np.float64))
    np.testing.assert_allclose(weights[~signal.tail_N], p[~signal.tail_N], rtol=2e-5)
    assert (p[signal.tail_N] < weights[signal.tail_N]).all()
    lowest = np.full(len(signal), np.inf)
    np.minimum.at(lowest, signal.rows_N[~signal.tail_N], weights[~signal.tail_N])
    highest = np.zeros(len(signal))
    np.maximum.at(highest, signal.rows_N[signal.tail_N], weights[signal.tail_N])
    assert (lowest >= highest * (1 - 2e-6)).all()
    head_mass = np.bincount(
        signal.rows_N[~signal.tail_N], weights=p[~signal.tail_N], minlength=len(signal)
    )
    tail_mass = 1 - head_mass
    assert (signal.tail_counts_S >= np.ceil(tail_mass / tau - 1e-3)).all()
    assert (signal.tail_counts_S <= np.ceil(tail_mass / tau + 1e-3)).all()


def test_pps_without_a_tail_or_without_a_head() -> None:
    no_tail = select_rows(logits_of([0.5, 0.3, 0.2], 300), "pps:tau=0.06")
    assert no_tail.ids_N.tolist() == [0, 1, 2]
    assert no_tail.tail_counts_S.tolist() == [0]
    no_head = select_rows(torch.zeros(1, 300), "pps:tau=0.06")
    assert no_head.tail_counts_S.tolist() == [17]
    np.testing.assert_allclose(np.exp(no_head.logprobs_N), 1 / 17, rtol=1e-6)


def test_a_tail_token_as_heavy_as_the_tail_weight_joins_the_head() -> None:
    p = torch.tensor([[0.9, 0.06 * (1 - 1e-9), 0.02, 0.02]], dtype=torch.float64)
    num_head, num_tail, weight = split_head(p, p.sum(-1, keepdim=True), tau=0.06)
    assert (num_head.item(), num_tail.item()) == (2, 1)
    assert weight.item() == pytest.approx(0.04)


@pytest.mark.parametrize("spec", SPECS)
def test_a_position_is_the_same_in_any_batch(spec: str) -> None:
    logits, keys = torch.randn(40, 5000) * 3, keys_for(40)
    labels = torch.zeros(40, dtype=torch.long)
    rule = parse_selection(spec)
    whole = select(logits, labels, selection=rule, keys=keys)
    for part in (slice(0, 1), slice(3, 11), slice(39, 40)):
        one = select(logits[part], labels[part], selection=rule, keys=keys[part])
        np.testing.assert_array_equal(one.ids_N, whole[part].ids_N)
        np.testing.assert_array_equal(one.logprobs_N, whole[part].logprobs_N)


def test_another_seed_or_position_draws_anew() -> None:
    logits = torch.zeros(2, 3000)
    first, other = select_rows(logits, "pps:tau=0.1"), select_rows(logits, "pps:tau=0.1", seed=1)
    assert first.ids_N.tolist() != other.ids_N.tolist()
    assert first[:1].ids_N.tolist() != first[1:].ids_N.tolist()


def test_scalars_against_float64() -> None:
    logits = torch.randn(50, 700) * 4
    labels = torch.arange(50)
    signal = select(
        logits,
        labels,
        selection=parse_selection("topk:k=3"),
        keys=keys_for(50),
        scalars=("label_logprob", "label_rank", "entropy", "lse", "lse_T2.0"),
    )
    logp = logits.double().log_softmax(-1).numpy()
    label_logp = logp[np.arange(50), labels]
    np.testing.assert_allclose(signal.scalars["label_logprob"], label_logp, atol=1e-5)
    rank = 1 + (logp > label_logp[:, None]).sum(1)
    np.testing.assert_array_equal(signal.scalars["label_rank"], rank)
    np.testing.assert_allclose(signal.scalars["entropy"], -(np.exp(logp) * logp).sum(1), atol=1e-4)
    np.testing.assert_allclose(signal.scalars["lse"], logits.double().logsumexp(-1), atol=1e-5)
    lse_2 = np.log(np.exp(logp / 2).sum(1))
    np.testing.assert_allclose(signal.scalars["lse_T2.0"], lse_2, atol=1e-5)


def test_vocabulary_padding_counts_as_nothing_and_is_reported() -> None:
    logits = torch.zeros(3, 128)
    stats = SelectionStats()
    signal = select_rows(logits, "full", num_ids=100, stats=stats)
    assert int(signal.ids_N.max()) == 99
    np.testing.assert_allclose(np.exp(signal.logprobs_N), 0.01, rtol=1e-5)
    assert stats.num_positions == 3
    assert stats.padding_mass / 3 == pytest.approx(28 / 128, abs=1e-6)


def test_label_in_the_padding_has_no_probability() -> None:
    signal = select(
        torch.zeros(1, 128),
        torch.tensor([120]),
        selection=parse_selection("topk:k=2"),
        keys=keys_for(1),
        num_ids=100,
    )
    assert signal.scalars["label_logprob"].tolist() == [-np.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 3000) * 4).to(dtype)
    signal = select_rows(logits, "topk:k=20")
    dense = softmax(logits)[signal.rows_N, signal.ids_N]
    np.testing.assert_allclose(np.exp(signal.logprobs_N), dense, rtol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_distribution_are_refused(bad: float) -> None:
    logits = torch.zeros(3, 50)
    logits[1, 4] = bad
    with pytest.raises(TeacherError, match="position 2"):
        select_rows(logits, "topk:k=2")


def test_no_positions() -> None:
    assert len(select_rows(torch.zeros(0, 50), "pps:tau=0.06")) == 0


@pytest.mark.parametrize(
    "spec",
    [
        "best",
        "topk:k=0",
        "topk:j=3",
        "topk:k=x",
        "topp:p=1.5",
        "pps:tau=0",
        "counts:n=0",
        "full:k=1",
    ],
)
def test_bad_specs_name_what_is_expected(spec: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_selection(spec)


@pytest.mark.parametrize("spec", [*SPECS, "pps:tau=0.06,temperature=2.0"])
def test_spec_round_trip(spec: str) -> None:
    assert parse_selection(parse_selection(spec).spec) == parse_selection(spec)


def test_temperature_draws_from_the_tempered_distribution() -> None:
    logits = torch.randn(1, 40).repeat(4000, 1) * 3
    signal = select_rows(logits, "counts:n=20,temperature=2.0")
    mean = signal.to_dense(40).mean(0)
    np.testing.assert_allclose(mean, softmax(logits[:1] / 2)[0], atol=0.01)
