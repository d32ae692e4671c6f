"""What all selections read: largest tokens, log masses and scalars, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdstore.select import DEFAULT_SCALARS, parse_selection, select
from kdstore.select.distribution import Distribution
from tests.select.dense import SPECS, keys_for, logits_of, select_rows


def rows_with_ties(vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    normal = torch.randn(6, vocab_size, generator=generator)
    alike = torch.zeros(1, vocab_size)
    few = torch.full((1, vocab_size), -torch.inf)
    few[0, -3:] = 1.0
    return torch.cat([normal.bfloat16().float() * 2, normal.round(), alike, few])


@pytest.mark.parametrize("vocab_size", [5, 64, 1000, 32_000, 131_073])
@pytest.mark.parametrize("k", [1, 7, 50, 700])
def test_the_largest_come_first_and_of_equals_the_lowest_ids(vocab_size: int, k: int) -> None:
    logits = rows_with_ties(vocab_size)
    want = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :k]
    got = Distribution.of_logits(logits).largest_ids(k)[:, :vocab_size]
    np.testing.assert_array_equal(got, want)


def test_topk_keeps_the_lowest_ids_of_equals() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 3.0]).repeat(2, 1)
    assert select_rows(logits, "topk:k=4").ids_N.tolist() == [1, 2, 3, 5] * 2


@pytest.mark.parametrize("spec", ["topk:k=50", "topp:p=0.9,max_k=40"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_rest_is_the_log_sum_exp_of_what_is_not_kept(spec: str, scale: float) -> None:
    logits = (torch.randn(5, 262_144) * scale).bfloat16()
    signal = select_rows(logits, spec)
    logp = logits.double().log_softmax(-1)
    logp[signal.rows_N, signal.ids_N] = -torch.inf
    np.testing.assert_allclose(signal.rest_S, logp.logsumexp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [20.0, 80.0, 100.0, 3000.0])
def test_rest_far_below_float32_probabilities(gap: float) -> None:
    logits = torch.zeros(3, 1000)
    logits[:2, 3] = gap
    for spec in ("topk:k=1", "topp:p=0.9,max_k=1"):
        rest = select_rows(logits, spec).rest_S
        want = np.log(999) - np.logaddexp(gap, np.log(999))
        np.testing.assert_allclose(rest, [want, want, np.log(0.999)], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spec", [*SPECS, "pps:tau=0.06,temperature=2.0"])
def test_one_possible_token(spec: str) -> None:
    """-inf elsewhere, also in the padding to whole blocks, keeps NaN out."""
    row = torch.full((1, 131_073), -torch.inf)
    row[0, 131_072] = -7.0
    signal = select(
        row,
        torch.tensor([131_072]),
        selection=parse_selection(spec),
        keys=keys_for(1),
        scalars=(*DEFAULT_SCALARS, "lse", "lse_T2.0"),
    )
    assert signal.ids_N.tolist() == [131_072]
    assert signal.logprobs_N.tolist() == [0.0]
    assert signal.rest_S.tolist() == [-np.inf]
    assert signal.tail_counts_S.tolist() == [0]
    assert {name: value.tolist() for name, value in signal.scalars.items()} == {
        "label_logprob": [0.0],
        "label_rank": [1.0],
        "entropy": [0.0],
        "lse": [-7.0],
        "lse_T2.0": [0.0],
    }


def test_all_tokens_alike() -> None:
    row = torch.full((1, 262_144), 3.0).bfloat16()
    pps, counts = select_rows(row, "pps:tau=0.06"), select_rows(row, "counts:n=50")
    assert pps.tail_counts_S.tolist() == [17]
    assert counts.counts_N is not None
    assert counts.counts_N.sum() == 50
    topp = select_rows(row, "topp:p=0.5")
    assert topp.ids_N.tolist() == list(range(100))
    assert topp.rest_S[0] == pytest.approx(np.log1p(-100 / 262_144), abs=1e-9)
    assert topp.scalars["entropy"][0] == pytest.approx(np.log(262_144), abs=1e-6)
    assert topp.scalars["label_rank"].tolist() == [1.0]


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_scalars_of_a_large_vocabulary(offset: float) -> None:
    logits = torch.randn(3, 262_144) * torch.tensor([[0.5], [3.0], [8.0]]) + offset
    names = ("label_logprob", "entropy", "lse", "lse_T1.5")
    labels = torch.tensor([0, 262_143, 77])
    signal = select(
        logits, labels, selection=parse_selection("topk:k=1"), keys=keys_for(3), scalars=names
    )
    exact = logits.double()
    logp = exact.log_softmax(-1)
    want = {
        "label_logprob": logp.gather(1, labels[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "lse": exact.logsumexp(-1),
        "lse_T1.5": (logp / 1.5).logsumexp(-1),
    }
    for name, values in want.items():
        np.testing.assert_allclose(signal.scalars[name], values, atol=2e-6, rtol=1e-6)


def test_logits_that_require_grad() -> None:
    logits = logits_of([0.7, 0.3], 10).requires_grad_()
    assert select_rows(logits, "topk:k=1").ids_N.tolist() == [0]
