"""Fidelity of whole stores, against dense references made from the same samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import kdstore
from kdstore.errors import CorruptShardError, UsageError
from kdstore.readers import fidelity
from kdstore.readers.fidelity import store_fidelity
from kdstore.readers.store import Store
from kdstore.sample import Sample
from kdstore.select import pps
from kdstore.select.distribution import Distribution
from kdstore.select.sampled import fixed_point

Dump = Callable[..., Path]
V = 384


def audited_pairs(path: Path, temperature: float = 1.0) -> tuple[NDArray, NDArray, list[Sample]]:
    """Dense decoded and dense teacher's [A, V] of all audited positions, and their samples."""
    decoded, teacher, samples = [], [], []
    store, audit = kdstore.open(path), kdstore.open(path, signal="audit")
    for sample, audited in zip(store, audit, strict=True):
        rows = np.isin(sample.positions_S, audited.positions_S)
        decoded.append(sample.signal[rows].to_dense(V))  # type: ignore[index]
        p = audited.signal.to_dense(V) ** (1 / temperature)  # type: ignore[union-attr]
        teacher.append(p / p.sum(1, keepdims=True))
        samples.append(sample)
    return np.concatenate(decoded), np.concatenate(teacher), samples


@pytest.mark.parametrize(
    ("select", "temperature"),
    [("pps:tau=0.06", 1.0), ("pps:tau=0.1,temperature=2.0", 2.0), ("counts:n=20", 1.0)],
)
def test_figures_of_sampled_signals(dump: Dump, select: str, temperature: float) -> None:
    path = dump(select=select, audit_fraction=0.3)
    q, t, _ = audited_pairs(path, temperature)
    found = store_fidelity(kdstore.open(path))
    count, support = len(t), (t > 0).sum(1)
    assert found["num_audited"] == count > 300
    assert found["kept_mass"] == pytest.approx(1, abs=1e-6)
    squared = ((q - t) ** 2).sum(1)
    assert found["variance"] == pytest.approx(squared.mean())
    assert found["variance_error"] == pytest.approx(squared.std(ddof=1) / np.sqrt(count))
    relative = np.divide((q - t) ** 2, t, out=np.zeros_like(t), where=t > 0).sum(1)
    assert found["relative_variance"] == pytest.approx(relative.mean())
    bias = (q - t).mean(0)
    assert found["gradient_bias"] == pytest.approx(np.sqrt((bias**2).sum()))
    assert found["gradient_bias_by_chance"] == pytest.approx(np.sqrt(squared.sum()) / count)
    assert found["equivalent_rounds"] == pytest.approx((1 - (t**2).sum(1)).mean() / squared.mean())
    assert found["relative_equivalent_rounds"] == pytest.approx(
        (support - 1).mean() / found["relative_variance_expected"]
    )
    sparse, dense = 1 / V - q.mean(0), 1 / V - t.mean(0)
    cosine = sparse @ dense / np.linalg.norm(sparse) / np.linalg.norm(dense)
    assert found["gradient_angle_degrees"] == pytest.approx(np.degrees(np.arccos(cosine)))
    assert 0.5 < found["gradient_bias"] / found["gradient_bias_by_chance"] < 1.5
    difference = found["relative_variance"] - found["relative_variance_expected"]
    assert abs(difference) < 5 * found["relative_variance_error"]


def test_counts_are_worth_their_rounds(dump: Dump) -> None:
    found = store_fidelity(kdstore.open(dump(select="counts:n=20", audit_fraction=1)))
    assert found["equivalent_rounds"] == pytest.approx(20, rel=0.1)
    assert found["relative_equivalent_rounds"] == pytest.approx(20, rel=1e-6)


@pytest.mark.parametrize("select", ["topk:k=4", "topp:p=0.8,max_k=50", "full"])
def test_figures_of_ranked_signals(dump: Dump, select: str) -> None:
    path = dump(select=select, audit_fraction=0.3)
    q, t, samples = audited_pairs(path)
    found = store_fidelity(kdstore.open(path))
    kept = q > 0
    assert found["num_audited"] == len(t)
    assert found["kept_mass"] == pytest.approx(q.sum(1).mean())
    truncation = -np.log((t * kept).sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.maximum((t * ~kept).sum(1), 1e-300)
        terms = np.where(kept & (t > 0), t * np.log(t / q), 0).sum(1)
        quantisation = terms + np.where(
            rest > 1e-300, rest * np.log(rest / np.maximum(1 - q.sum(1), 1e-300)), 0
        )
    for name, want in (("kl_truncation", truncation), ("kl_quantisation", quantisation)):
        assert found[name] == pytest.approx(
            {"mean": want.mean(), "p99": np.quantile(want, 0.99), "max": want.max()},
            abs=1e-5,
        )
    if select == "full":
        assert found["kl_quantisation"]["max"] < 1e-6
        assert found["kl_truncation"]["max"] < 1e-9
    else:
        assert 1e-5 < found["kl_quantisation"]["mean"] < 1e-2
    assert len(samples) == 60


def test_chunks_change_nothing(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    store = kdstore.open(dump(audit_fraction=0.3))
    whole = store_fidelity(store)
    monkeypatch.setattr(fidelity, "CHUNK_ELEMENTS", 2 * V)
    assert store_fidelity(store) == pytest.approx(whole)


def test_the_signal_that_a_store_was_opened_for_does_not_matter(dump: Dump) -> None:
    path = dump(audit_fraction=0.3)
    assert store_fidelity(kdstore.open(path, signal="audit")) == store_fidelity(kdstore.open(path))


def flattened(described: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    """The tail's mass spread evenly over its tokens: a biased draw."""
    p, block_mass = fixed_point(described)
    tail = (p < 0.06) & (p > 0)
    mean = (p * tail).sum(-1, keepdim=True) / tail.sum(-1, keepdim=True)
    p = torch.where(tail, mean, p)
    return p, p.view(*block_mass.shape, -1).sum(-1, dtype=torch.float64)


def test_a_bias_is_seen(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pps, "fixed_point", flattened)
    found = store_fidelity(kdstore.open(dump(audit_fraction=1)))
    assert found["gradient_bias"] > 2 * found["gradient_bias_by_chance"]


@pytest.mark.parametrize("fraction", [0, 1e-6])
def test_a_store_without_audited_positions(dump: Dump, fraction: float) -> None:
    with pytest.raises(UsageError, match="--audit-fraction"):
        store_fidelity(kdstore.open(dump(audit_fraction=fraction)))


def test_audited_positions_that_are_not_scored(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    store = kdstore.open(dump(audit_fraction=1))
    get = Store.__getitem__

    def shortened(self: Store, index: int) -> Sample:
        sample = get(self, index)
        if self.signal == "audit":
            return sample
        return replace(sample, runs=((1, 2),), signal=sample.signal[:1])  # type: ignore[index]

    monkeypatch.setattr(Store, "__getitem__", shortened)
    with pytest.raises(CorruptShardError, match="'row-0'"):
        store_fidelity(store)
