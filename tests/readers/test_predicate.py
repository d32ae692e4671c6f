"""What a predicate can be known not to match, from bounds of columns alone."""

from __future__ import annotations

from functools import reduce
from operator import and_, or_

import polars as pl
import pytest

from kdstore.readers.predicate import conditions_of

N, S = pl.col("n"), pl.col("s")
BOUNDS = {"n": (10, 20), "s": ("f", "k")}

CANNOT = [
    N > 20,
    N >= 21,
    N < 10,
    N <= 9,
    N == 21,
    pl.lit(9) >= N,
    pl.lit(20) < N,
    pl.lit(9) == N,
    S == "e",
    S > "k",
    S < "f",
    N.is_in([9, 21, 300]),
    S.is_in(["a", "z"]),
    N.is_between(21, 30),
    N.is_between(1, 9, closed="none"),
    (N > 20) & S.str.contains("a"),
    (N > 20) | (S == "l"),
    (pl.col("other") == 1) & (N == 1),
    reduce(and_, [pl.col("other") == i for i in range(20)]) & (N > 20),
]
MAY = [
    N > 19,
    N >= 20,
    N < 11,
    N <= 10,
    N == 15,
    pl.lit(10) >= N,
    S == "f",
    S >= "k",
    N.is_in([9, 20]),
    S.is_in(["a", "g"]),
    N.is_between(20, 30),
    N.is_between(30, 5),
    (N > 20) | (S == "g"),
    (N > 20) | (pl.col("other") == 1),
    ~(N > 9),
    N != 10,
    N > 20.5,
    N.cast(pl.Int64) > 20,
    N.is_in([1, None]),
    N.is_null(),
    N.is_between(pl.col("other"), 5),
    pl.col("other").is_between(N, 5),
    pl.col("other") > N,
    (N - 20) > 5,
    S.str.len_chars() > 5,
    pl.lit(True),
    (N > 20) ^ (N > 30),
    N.map_batches(lambda n: n > 100, return_dtype=pl.Boolean),
    reduce(or_, [100 + i == N for i in range(100)]),
]


def may_match(expr: pl.Expr) -> bool:
    return all(condition.may_match(BOUNDS) for condition in conditions_of(expr))


@pytest.mark.parametrize("expr", CANNOT, ids=str)
def test_what_bounds_rule_out(expr: pl.Expr) -> None:
    assert not may_match(expr)


@pytest.mark.parametrize("expr", MAY, ids=str)
def test_what_may_match(expr: pl.Expr) -> None:
    """And what is not understood, or lies too deep."""
    assert may_match(expr)


def test_conditions_are_what_and_joins() -> None:
    conditions = conditions_of((N > 1) & (S == "x") & ((N < 5) | (pl.col("other") > N)))
    assert {condition.columns for condition in conditions} == {
        frozenset("n"),
        frozenset("s"),
        frozenset({"n", "other"}),
    }
    frame = pl.DataFrame({"n": [1, 2, 3, 4], "s": list("xxyx"), "other": [9, 0, 9, 9]})
    left = reduce(lambda rows, condition: rows.filter(condition.expr), conditions, frame)
    assert left["n"].to_list() == [2, 4]
