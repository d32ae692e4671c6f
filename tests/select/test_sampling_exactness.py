"""What pps and counts promise of their sums, at a vocabulary where float32 sums fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdstore.hashing import Purpose, RowKeys
from kdstore.select import parse_selection, select
from kdstore.select.distribution import Distribution
from kdstore.select.pps import most_head, split_head
from kdstore.select.sampled import UNIT, fixed_point, tokens_at
from tests.select.dense import hard_rows, keys_for, reference_head, select_rows, softmax

VOCAB = 262_144
ROWS = 256
WINDOW = 2e-5


def light_row() -> torch.Tensor:
    """bfloat16 logits: two heads, 40 tokens of 1 %, then 262,102 of 1.2e-8 each: 0.3 % in all."""
    p = torch.full((VOCAB,), 1.2e-8, dtype=torch.float64)
    p[:40], p[40], p[41] = 0.01, 0.4, 0.2
    return p.log().bfloat16()[None]


def flat_row() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(1, VOCAB, generator=generator) * 2).bfloat16()


def spread_evenly(self: RowKeys, purpose: Purpose, *, count: int = 1) -> NDArray[np.float64]:
    """[S, count] evenly spaced over ROWS rows: draws at them are an integral over the uniform."""
    return ((self.position_S[:, None] - 1) * count + np.arange(count) + 0.5) / (ROWS * count)


def hits(ids: NDArray[np.int64], ranges: int) -> NDArray[np.int64]:
    return np.bincount(ids * ranges // VOCAB, minlength=ranges)


def running_sum_draws(p: NDArray[np.float64], count: int, dtype: type) -> NDArray[np.int64]:
    """Ids at evenly spaced points of a cumulative sum that is kept in ``dtype``."""
    cumulative = np.cumsum(p, dtype=dtype)
    points = (np.arange(count) + 0.5) / count * cumulative[-1]
    return np.searchsorted(cumulative, points, side="right")


@pytest.mark.parametrize(("name", "ranges"), [("light", 4), ("flat", 64)])
@pytest.mark.parametrize("spec", ["pps:tau=0.02", "counts:n=200"])
def test_draws_integrate_to_the_float64_distribution(
    monkeypatch: pytest.MonkeyPatch, spec: str, name: str, ranges: int
) -> None:
    """A range of ids is hit as its mass says, give or take one of the evenly spaced points.

    The control, a running sum in float32, never hits the light tokens.
    """
    monkeypatch.setattr(RowKeys, "uniform", spread_evenly)
    row = {"light": light_row, "flat": flat_row}[name]()
    signal, p = select_rows(row.expand(ROWS, VOCAB), spec), softmax(row)[0]
    if signal.tail_N is not None:
        p[signal.ids_N[~signal.tail_N]] = 0
    counts = signal.tail_N if signal.counts_N is None else signal.counts_N
    drawn = np.repeat(signal.ids_N, counts).astype(np.int64)
    want = p.reshape(ranges, -1).sum(1) / p.sum() * len(drawn)
    np.testing.assert_allclose(hits(drawn, ranges), want, atol=1.5)
    in_float64 = hits(running_sum_draws(p, len(drawn), np.float64), ranges)
    np.testing.assert_allclose(in_float64, want, atol=1.5)
    if name == "light":
        assert want[1:].min() > 10
        assert hits(running_sum_draws(p, len(drawn), np.float32), ranges)[1:].tolist() == [0] * 3


def spread_at_the_end(self: RowKeys, purpose: Purpose, *, count: int = 1) -> NDArray[np.float64]:
    return 1 - WINDOW * (1 - spread_evenly(self, purpose, count=count))


@pytest.mark.parametrize("spec", ["pps:tau=0.02", "counts:n=200"])
def test_each_light_token_gets_its_step_where_the_sum_is_large(
    monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    """The last 30 tokens are hit alike. The control: rounded to float32, sums miss half of them."""
    monkeypatch.setattr(RowKeys, "uniform", spread_at_the_end)
    row = light_row()
    signal, p = select_rows(row.expand(ROWS, VOCAB), spec), softmax(row)[0]
    if signal.counts_N is None:
        p[signal.ids_N[~signal.tail_N]] = 0
        points, counts, reach = ROWS, signal.tail_N, p.sum() / signal.tail_counts_S[0]
    else:
        points, counts, reach = ROWS * 200, signal.counts_N, 1.0
    drawn = np.repeat(signal.ids_N, counts)
    want = p[-30:] * points / (WINDOW * reach)
    assert want.min() > 7
    got = np.bincount(drawn, minlength=VOCAB)[-30:]
    np.testing.assert_allclose(got, want, atol=1.5)
    cumulative = np.cumsum(p).astype(np.float32).astype(np.float64)
    ends = cumulative[-1] - WINDOW * reach * (np.arange(points) + 0.5) / points
    control = np.bincount(np.searchsorted(cumulative, ends, side="right"), minlength=VOCAB)[-30:]
    assert (control == 0).sum() > 10


@pytest.mark.parametrize("count", [500, 5000])  # searched by blocks, and in all sums
def test_points_fall_on_the_token_whose_step_covers_them(count: int) -> None:
    row = torch.cat([flat_row(), light_row()])
    p, mass = fixed_point(Distribution.of_logits(row))
    cumulative = np.cumsum(p.double().numpy(), axis=1)
    points = np.random.default_rng(0).random((2, count)) * cumulative[:, -1:]
    points[:, :200] = cumulative[:, 7::1000][:, :200]  # the end of a step is the next one's start
    points[:, 200] = 2.0
    got = tokens_at(torch.from_numpy(points), p, mass).numpy()
    for line in range(2):
        want = np.searchsorted(cumulative[line], points[line], side="right")
        want[200] = np.flatnonzero(p[line])[-1]
        np.testing.assert_array_equal(got[line], want)


def test_fixed_point_sums_are_exact_in_any_order() -> None:
    rows = Distribution.of_logits(flat_row())
    p, mass = fixed_point(rows)
    units = (p[0].double() / UNIT).long()
    assert (units.double() * UNIT == p[0]).all()
    total = int(units.sum())
    assert total == sum(mass[0, torch.randperm(mass.shape[1])].tolist()) / UNIT
    assert (p.double() - rows.p_CW).abs().max() <= 2**-25
    assert (p.double() - rows.p_CW)[rows.p_CW < 2**-29].abs().max() <= UNIT / 2


def test_counts_of_more_draws_than_blocks_sum_to_n() -> None:
    signal = select_rows(flat_row().expand(3, VOCAB), "counts:n=60000")
    assert signal.counts_N is not None
    np.testing.assert_array_equal(np.add.reduceat(signal.counts_N, signal.indptr[:-1]), 60_000)


@pytest.mark.parametrize("tau", [0.01, 0.06, 0.3, 1.0])
def test_head_and_draws_are_those_of_full_passes(tau: float) -> None:
    """Also of falling rows, whose heads grow by one token at a time."""
    falling = [-rate * torch.arange(600.0)[None] for rate in (0.01, 0.1, 0.7, 3, 13.9, 20)]
    logits = torch.cat([*hard_rows(600).values(), *falling])
    logits = torch.cat([logits, torch.randn(300, 600) * torch.linspace(0.5, 9, 300)[:, None]])
    signal = select_rows(logits, f"pps:tau={tau}")
    p, _ = fixed_point(Distribution.of_logits(logits))
    assert signal.tail_N is not None
    for row in range(len(logits)):
        head, num_tail, weight = reference_head(p[row].double().numpy(), tau=tau)
        part = signal[row : row + 1]
        assert part.ids_N[~part.tail_N].tolist() == np.flatnonzero(head).tolist()
        assert part.tail_counts_S.tolist() == [num_tail]
        tail = np.exp(part.logprobs_N[part.tail_N].astype(np.float64))
        np.testing.assert_allclose(tail, weight, rtol=1e-6)


@pytest.mark.parametrize("slack", [0.0, 0.9e-6])
@pytest.mark.parametrize("tau", [0.02, 0.06, 0.1, 0.3, 1.0])
def test_no_head_is_larger_than_the_candidates(tau: float, slack: float) -> None:
    """Rows of the longest heads: each token just heavy enough to join what is left."""
    p, left = [], 1.0
    while left > 0:
        weight = left / np.ceil(left / tau)
        p.append(min(left, np.ceil(weight * (1 - slack) / UNIT) * UNIT))
        left -= p[-1]
    row = torch.tensor([p + [0.0] * 9], dtype=torch.float64)
    num_head, num_tail, _ = split_head(row, row.sum(-1, keepdim=True), tau=tau)
    assert (num_head.item(), num_tail.item()) == (len(p), 0)
    assert 1 / tau <= len(p) <= most_head(tau)


@pytest.mark.parametrize("spec", ["pps:tau=0.06", "counts:n=50"])
def test_other_last_bits_of_probabilities_change_few_draws(
    monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    """As a device with another exponential would: one draw in 20,000, by measurement."""
    ranks = torch.arange(1, 5001).log()
    generator = torch.Generator().manual_seed(5)
    slopes = 1 + 1.6 * torch.rand(400, 1, generator=generator)
    noise = torch.randn(400, 5000, generator=generator) / 2
    logits = (noise - slopes * ranks).bfloat16()
    ours = select_rows(logits, spec)
    monkeypatch.setattr(
        Distribution, "p_CW", property(lambda rows: rows.shifted_CW.double().softmax(-1).float())
    )
    theirs = select_rows(logits, spec)
    changed = ((ours.to_dense(5000) > 0) != (theirs.to_dense(5000) > 0)).sum() / 2
    draws = ours.tail_counts_S.sum() if ours.counts_N is None else ours.counts_N.sum()
    assert changed <= draws / 1000


@pytest.mark.parametrize("elements", [1, 3000, 7000, 1 << 20])
@pytest.mark.parametrize("spec", ["topk:k=5", "topp:p=0.9", "pps:tau=0.06", "counts:n=50"])
def test_chunks_do_not_change_entries(
    monkeypatch: pytest.MonkeyPatch, spec: str, elements: int
) -> None:
    logits, labels = torch.randn(23, 1000).bfloat16() * 3, torch.arange(23)
    rule, keys = parse_selection(spec), keys_for(23)
    whole = select(logits, labels, selection=rule, keys=keys)
    monkeypatch.setattr("kdstore.select.driver.CPU_CHUNK_ELEMENTS", elements)
    parts = select(logits, labels, selection=rule, keys=keys)
    np.testing.assert_array_equal(parts.indptr, whole.indptr)
    np.testing.assert_array_equal(parts.ids_N, whole.ids_N)
    np.testing.assert_array_equal(parts.logprobs_N, whole.logprobs_N)
    for name, values in whole.scalars.items():
        np.testing.assert_allclose(parts.scalars[name], values, atol=1e-6)
