"""Keyed randomness: uniform, independent, and the same wherever it is asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from kdstore.hashing import Purpose, RowKeys, canonical_json, hash_fields, json_digest


def keys(seed: int = 0, draw: int = 0, sample: str = "a", count: int = 20_000) -> RowKeys:
    return RowKeys.of_samples([(sample, np.arange(count))], seed=seed, draw=draw)


def test_uniforms_are_uniform() -> None:
    values = keys().uniform(Purpose.TAIL_SAMPLING, count=5)
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-3
    assert values.min() >= 0
    assert values.max() < 1


def test_every_part_of_a_key_matters_and_none_correlate() -> None:
    streams = {
        "base": keys().uniform(Purpose.TAIL_SAMPLING)[:, 0],
        "seed": keys(seed=1).uniform(Purpose.TAIL_SAMPLING)[:, 0],
        "draw": keys(draw=1).uniform(Purpose.TAIL_SAMPLING)[:, 0],
        "sample": keys(sample="b").uniform(Purpose.TAIL_SAMPLING)[:, 0],
        "purpose": keys().uniform(Purpose.VALUE_ROUNDING)[:, 0],
        "index": keys().uniform(Purpose.TAIL_SAMPLING, count=2)[:, 1],
        "next position": keys().uniform(Purpose.TAIL_SAMPLING)[1:, 0],
    }
    for one, other in itertools.combinations(streams.values(), 2):
        size = min(len(one), len(other))
        assert abs(np.corrcoef(one[:size], other[:size])[0, 1]) < 5 / np.sqrt(size)


def test_slices_and_pairs_give_the_same_numbers() -> None:
    whole = keys(count=50).uniform(Purpose.MULTINOMIAL, count=4)
    np.testing.assert_array_equal(
        keys(count=50)[7:9].uniform(Purpose.MULTINOMIAL, count=4), whole[7:9]
    )
    rows, index = np.array([3, 49]), np.array([2, 0])
    at = keys(count=50).uniform_at(Purpose.MULTINOMIAL, rows, index)
    np.testing.assert_array_equal(at, whole[rows, index])


def test_the_hash_is_frozen() -> None:
    """Stores depend on these numbers: a change here is a change of format."""
    assert hash_fields(0, 1, 2).tolist() == [6768782832058643234]
    assert keys(count=1).uniform(Purpose.TAIL_SAMPLING)[0, 0] == 0.6480070195221406
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "TAIL_SAMPLING": 1,
        "MULTINOMIAL": 2,
        "VALUE_ROUNDING": 3,
        "WEIGHT_ROUNDING": 4,
        "SCALAR_ROUNDING": 5,
        "ORDER": 6,
        "GROUP_ORDER": 7,
        "AUDIT": 8,
        "SHARD_ORDER": 9,
        "GENERATION": 10,
    }


def test_canonical_json() -> None:
    assert canonical_json({"b": 1, "a": ["é", None]}) == '{"a":["é",null],"b":1}'.encode()
    assert json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
