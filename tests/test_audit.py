"""Which positions are audited: a share of them, whoever asks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kdstore.audit import audit_runs, audited_rows
from kdstore.hashing import RowKeys
from kdstore.sample import Sample


def keys(count: int, *, name: str = "a", seed: int = 0) -> RowKeys:
    return RowKeys.of_samples([(name, np.arange(count))], seed=seed)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.7])
def test_the_share_is_the_fraction(fraction: float) -> None:
    count = 50_000
    found = len(audited_rows(keys(count), fraction=fraction))
    assert abs(found - fraction * count) < 4 * np.sqrt(count * fraction * (1 - fraction))


def test_nothing_and_everything() -> None:
    assert audited_rows(keys(100), fraction=0.0).tolist() == []
    assert audited_rows(keys(100), fraction=1.0).tolist() == list(range(100))


def test_the_choice_is_frozen() -> None:
    """A resume by another version must agree: a change here is a change of format."""
    assert audited_rows(keys(200), fraction=0.04).tolist() == [7, 82, 110]


def test_the_choice_depends_on_seed_sample_and_position_alone() -> None:
    whole = audited_rows(keys(1000), fraction=0.3)
    part = np.arange(100, 900, 3)
    found = part[audited_rows(keys(1000)[part], fraction=0.3)]
    np.testing.assert_array_equal(found, np.intersect1d(whole, part))
    np.testing.assert_array_equal(audited_rows(replace(keys(1000), draw=1), fraction=0.3), whole)
    for other in (keys(1000, seed=1), keys(1000, name="b")):
        assert len(np.intersect1d(audited_rows(other, fraction=0.3), whole)) < 150


def test_a_larger_fraction_adds_positions() -> None:
    few, more = (audited_rows(keys(1000), fraction=f) for f in (0.1, 0.2))
    assert set(few) < set(more)


def test_runs_are_of_scored_positions() -> None:
    sample = Sample("a", np.zeros(400, dtype=np.int32), runs=((3, 90), (200, 400)))
    runs = audit_runs(sample, fraction=0.25, seed=5)
    positions = np.concatenate([np.arange(start, end) for start, end in runs])
    every = RowKeys.of_samples([("a", sample.positions_S)], seed=5)
    want = sample.positions_S[audited_rows(every, fraction=0.25)]
    np.testing.assert_array_equal(positions, want)
    assert audit_runs(sample, fraction=1.0, seed=5) == sample.runs
    assert audit_runs(sample, fraction=0.0, seed=5) == ()
