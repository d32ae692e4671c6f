"""polars predicates, as far as they can be judged without rows.

polars shows what an expression does as JSON only, whose form may change from version to version.
What is not understood here may match anything: it costs reading, never rows.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

Bounds = Mapping[str, tuple[Any, Any]]
Test = Callable[[Bounds], bool]
_MAX_DEPTH = 32
_MIRRORED = {"Lt": "Gt", "LtEq": "GtEq", "Gt": "Lt", "GtEq": "LtEq"}


@dataclass(frozen=True, eq=False)
class Condition:
    """One of the conditions that a predicate joins by *and*, and the columns it reads.

    ``may_match`` tells whether a row may fulfil it whose values lie within the bounds, (least,
    greatest) by column.
    """

    expr: pl.Expr
    columns: frozenset[str]
    may_match: Test


def conditions_of(predicate: pl.Expr, *, depth: int = 0) -> list[Condition]:
    """The conditions that a predicate joins by *and*; a row must fulfil each."""
    match _node(predicate, depth):
        case {"BinaryExpr": {"op": "And"}}:
            sides = predicate.meta.pop()
            return [part for side in sides for part in conditions_of(side, depth=depth + 1)]
    columns = frozenset(predicate.meta.root_names())
    return [Condition(predicate, columns, _test_of(predicate, depth))]


def _test_of(expr: pl.Expr, depth: int) -> Test:
    match _node(expr, depth):
        case {"BinaryExpr": {"op": "And"}}:
            sides = [_test_of(side, depth + 1) for side in expr.meta.pop()]
            return lambda bounds: all(side(bounds) for side in sides)
        case {"BinaryExpr": {"op": "Or"}}:
            sides = [_test_of(side, depth + 1) for side in expr.meta.pop()]
            return lambda bounds: any(side(bounds) for side in sides)
        case {"BinaryExpr": {"left": {"Column": name}, "op": op}}:
            return _comparison(name, op, _literals(expr))
        case {"BinaryExpr": {"right": {"Column": name}, "op": op}}:
            return _comparison(name, _MIRRORED.get(op, op), _literals(expr))
        case {"Function": {"input": [{"Column": name}, *_], "function": {"Boolean": rule}}}:
            return _membership(name, rule, _literals(expr))
    return _anything


def _anything(bounds: Bounds) -> bool:
    del bounds
    return True


def _comparison(name: str, op: str, values: list[Any]) -> Test:
    if len(values) != 1:
        return _anything
    (value,) = values
    tests: dict[str, Callable[[Any, Any], bool]] = {
        "Eq": lambda least, greatest: least <= value <= greatest,
        "Lt": lambda least, _: least < value,
        "LtEq": lambda least, _: least <= value,
        "Gt": lambda _, greatest: greatest > value,
        "GtEq": lambda _, greatest: greatest >= value,
    }
    return _within(name, values, tests[op]) if op in tests else _anything


def _membership(name: str, rule: Any, values: list[Any]) -> Test:
    if not _are_alike(values):
        return _anything
    ascending = sorted(values)
    match rule:
        case {"IsIn": _} | "IsIn":
            return _within(name, values, lambda *bounds: _any_between(ascending, *bounds))
        case {"IsBetween": _}:  # open or closed, and in whatever order polars gives the ends
            low, high = ascending[0], ascending[-1]
            return _within(name, values, lambda least, most: low <= most and high >= least)
    return _anything


def _any_between(ascending: list[Any], least: Any, greatest: Any) -> bool:
    place = bisect_left(ascending, least)
    return place < len(ascending) and bool(ascending[place] <= greatest)


def _within(name: str, values: list[Any], test: Callable[[Any, Any], bool]) -> Test:
    """The test of a column's bounds, passed where there are none that compare with the values."""

    def passes(bounds: Bounds) -> bool:
        given = bounds.get(name)
        return given is None or not _are_alike([*given, *values[:1]]) or test(*given)

    return passes


def _are_alike(values: list[Any]) -> bool:
    """Whether values are all texts or all integers, and there are any."""
    return {type(value) for value in values} in ({str}, {int})


def _literals(expr: pl.Expr) -> list[Any]:
    """What an operation on a column compares it with; nothing unless all of that is literal."""
    parts = expr.meta.pop()
    operands = [part for part in parts if part.meta.is_literal()]
    if len(operands) != len(parts) - 1:
        return []
    columns = [pl.select(operand).to_series() for operand in operands]
    flat = [column.explode() if column.dtype == pl.List else column for column in columns]
    return [value for column in flat for value in column.to_list()]


def _node(expr: pl.Expr, depth: int) -> Any:
    """The outermost operation of an expression; None if it lies too deep, or polars cannot say."""
    if depth > _MAX_DEPTH:
        return None
    try:
        return json.loads(expr.meta.serialize(format="json"))
    except (pl.exceptions.ComputeError, RecursionError):  # a Python function; a deep tree
        return None
