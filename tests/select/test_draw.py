"""Drawing a token against the dense float64 formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdstore.errors import TeacherError
from kdstore.hashing import Purpose, RowKeys
from kdstore.select.distribution import Distribution
from kdstore.select.draw import draw_tokens, tokens_under


def keys(count: int) -> RowKeys:
    return RowKeys.of_samples([("s", np.arange(count))], seed=1)


def at(
    rows: torch.Tensor, u: NDArray[np.float64], *, temperature: float = 1.0, top_p: float
) -> torch.Tensor:
    return tokens_under(Distribution.of_logits(rows).tempered(temperature), u, top_p=top_p)


def dense_distribution(
    logits_V: NDArray[np.float64], *, temperature: float, top_p: float
) -> NDArray[np.float64]:
    """Temperature, then the fewest most probable that reach top_p, of equals the lowest ids."""
    z = (logits_V - logits_V.max()) / temperature
    p = np.exp(z) / np.exp(z).sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    kept = np.zeros_like(p)
    kept[order[before < top_p]] = p[order[before < top_p]]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [3, 100, 1000])
def test_draws_are_the_inverse_of_the_dense_cumulative_sum(
    temperature: float, top_p: float, size: int
) -> None:
    """A uniform in the middle of a token's step draws that token; no uniform draws another."""
    generator = np.random.default_rng(size)
    logits = (generator.normal(size=size) * 2).astype(np.float32)
    p = dense_distribution(logits.astype(np.float64), temperature=temperature, top_p=top_p)
    likely = np.flatnonzero(p > 1e-6)
    u = (np.cumsum(p) - p / 2)[likely]
    rows = torch.from_numpy(logits).repeat(len(u), 1)
    found = at(rows, u, temperature=temperature, top_p=top_p)
    np.testing.assert_array_equal(found, likely)
    ends = at(
        rows[:1].repeat(2, 1), np.array([0, 1 - 2**-53]), temperature=temperature, top_p=top_p
    )
    assert set(ends.tolist()) <= set(np.flatnonzero(p).tolist())


def test_of_equals_the_lowest_ids_make_the_nucleus() -> None:
    found = at(torch.zeros(20, 10), np.arange(20) / 20, top_p=0.35)
    assert sorted(set(found.tolist())) == [0, 1, 2, 3]


def test_one_keyed_uniform_draws_a_row() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 90)).astype(np.float32))
    found = draw_tokens(rows, keys(50), temperature=0.5, top_p=0.9)
    u = keys(50).uniform(Purpose.GENERATION)[:, 0]
    assert torch.equal(found, at(rows, u, temperature=0.5, top_p=0.9))
    alone = draw_tokens(rows[7:8], keys(50)[7:8], temperature=0.5, top_p=0.9)
    assert alone.tolist() == [found[7]]


def test_temperature_zero_is_the_most_probable_of_equals_the_lowest_id() -> None:
    rows = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 2.0]])
    assert draw_tokens(rows, keys(2), temperature=0, top_p=0.5).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]])
def test_what_is_no_distribution_is_refused(temperature: float, bad: list[float]) -> None:
    rows = torch.tensor([[0.0, 1.0], bad])
    with pytest.raises(TeacherError, match="position 1 of a sample"):
        draw_tokens(rows, keys(2), temperature=temperature, top_p=1.0)
