"""The mean of decoded sampled signals is the dense distribution; biased variants are caught."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdstore.codecs import IdOrder, Positions, codec_for, pps
from kdstore.hashing import RowKeys
from kdstore.select import parse_selection, select
from kdstore.select.distribution import Distribution
from kdstore.select.pps import PPS
from tests.select.dense import logits_of, softmax

SEEDS = 4000
VOCAB = 300
LIMIT = 5.0  # standard errors; of 300 tokens the largest is above 4.5 once in 500 tries

ROWS = {
    "several heads": logits_of([0.4, 0.2, 0.1, 0.07, *[0.23 / 296] * 296], VOCAB),
    "one head": logits_of([0.93, *[0.07 / 299] * 299], VOCAB),
    "no head": torch.linspace(0, 1, VOCAB)[None],
    "tight heads": logits_of([0.31, 0.3, 0.3, *[0.09 / 297] * 297], VOCAB),
    "small tail": logits_of([0.6, 0.3999, *[1e-4 / 298] * 298], VOCAB),
    "peaked": torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 3,
}


def largest_deviation(logits: torch.Tensor, spec: str) -> float:
    """Largest distance of the mean of 4,000 seeds from the distribution, in standard errors.

    A standard error below that of a token drawn now and then at the tail's weight (or 1e-7, the
    rounding of float32) would call rare tokens and exact heads impossible.
    """
    keys = RowKeys(0, np.arange(SEEDS, dtype=np.uint64), np.full(SEEDS, 5, dtype=np.int64))
    rows, labels = logits.repeat(SEEDS, 1), torch.zeros(SEEDS, dtype=torch.long)
    signal = select(rows, labels, selection=parse_selection(spec), keys=keys, scalars=())
    codec = codec_for(signal.selection, order=IdOrder.identity(VOCAB), scalars=())
    positions = Positions(keys, np.array([0, SEEDS]), np.zeros(SEEDS, dtype=np.int32))
    planes = codec.encode(signal, positions)
    dense = codec.decode(planes, positions.previous_S).to_dense(VOCAB)
    tail = signal.logprobs_N if signal.tail_N is None else signal.logprobs_N[signal.tail_N]
    weight = np.exp(tail.min(initial=0))
    want = softmax(logits)[0]
    floor = np.maximum(np.sqrt(want * weight / SEEDS), 1e-7)
    error = np.maximum(dense.std(0) / np.sqrt(SEEDS), floor)
    return float((np.abs(dense.mean(0) - want) / error).max())


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("spec", ["pps:tau=0.06", "pps:tau=0.25", "counts:n=50"])
def test_decoded_signals_are_unbiased(spec: str, name: str) -> None:
    assert largest_deviation(ROWS[name], spec) < LIMIT


@pytest.mark.parametrize("uniform", [0.5, 0.999])
def test_a_biased_rounding_is_caught(monkeypatch: pytest.MonkeyPatch, uniform: float) -> None:
    """To the nearest, and always upward."""
    round_positions = pps.round_positions

    def biased(indptr: Any, logprobs: Any, tail: Any, value: Any, weight: Any, *rest: Any) -> Any:
        value, weight = np.full_like(value, uniform), np.full_like(weight, uniform)
        return round_positions(indptr, logprobs, tail, value, weight, *rest)

    monkeypatch.setattr(pps, "round_positions", biased)
    assert max(largest_deviation(row, "pps:tau=0.06") for row in ROWS.values()) > 2 * LIMIT


def test_a_tail_sampled_uniformly_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def flattened(self: PPS, teacher: Distribution) -> Distribution:
        p = teacher.p_CW.clone()
        tail = (p < 0.06) & (p > 0)
        mean = (p * tail).sum(-1, keepdim=True) / tail.sum(-1, keepdim=True)
        return Distribution.of_logits(torch.where(tail, mean, p).log())

    monkeypatch.setattr(PPS, "describes", flattened)
    assert largest_deviation(ROWS["peaked"], "pps:tau=0.06") > 2 * LIMIT


def test_one_uniform_used_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail's draw also rounding the tail weight ties which token to how heavy."""
    row = logits_of([1 - 2.1e-5, 1.0e-5, 1.1e-5], VOCAB)
    assert largest_deviation(row, "pps:tau=0.07") < LIMIT
    monkeypatch.setattr(
        RowKeys,
        "_base",
        lambda self, purpose: np.asarray(self.sample_hash_S * np.uint64(0x9E3779B97F4A7C15)),
    )
    assert largest_deviation(row, "pps:tau=0.07") > 2 * LIMIT
