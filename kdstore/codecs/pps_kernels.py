"""Compiled loops of the pps codec: rounding positions, and putting them together again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.ids import BAD_RANK, NEXT_STATUS, TWICE, UNUSED, read_run, successors_of
from kdstore.codecs.jit import i64, inlined, kernel, u
from kdstore.codecs.shorts import ONE, read_long
from kdstore.codecs.sorting import id_buffers, place

HEAD_STEPS = 2  # grid of head values: tau / 2
TAIL_STEPS = 3  # grid of the tail's mass: tau / 3
UNITS = HEAD_STEPS * TAIL_STEPS  # tau / 6, of which both are multiples
HEAD_UNITS, TAIL_UNITS = UNITS // HEAD_STEPS, UNITS // TAIL_STEPS
MANY = 15  # a count's nibble that says: more in the plane of that name
TOP, HEAD, TAIL, LEFT_OUT = range(4)
OFF_GRID, BAD_EXACT = NEXT_STATUS, NEXT_STATUS + 1
_SLACK = 1e-3  # of a step: a float32 weight on the edge of its interval


@kernel
def round_positions(
    indptr: NDArray[Any],
    logprobs: NDArray[Any],
    tail: NDArray[Any],
    value_uniform: NDArray[Any],
    weight_uniform: NDArray[Any],
    tau: float,
    group_N: NDArray[Any],
    code_N: NDArray[Any],
    weight_S: NDArray[Any],
    exact_S: NDArray[Any],
) -> tuple[int, int]:
    """Status (0: fine, 1: tail weights differ, 2: nothing left for the largest) and position.

    Fills the groups (``LEFT_OUT``: rounded to zero), head codes, weight codes, exact positions.
    """
    step = tau / HEAD_STEPS
    for s in range(len(indptr) - 1):
        top, tails, log_weight = first_groups(indptr[s], indptr[s + 1], logprobs, tail, group_N)
        if tails < 0:
            return 1, s
        if top < 0:
            continue
        group_N[top] = TOP
        left, place = 1.0, 0.0  # of the tail's mass between (n - 1) tau and n tau, in steps
        if tails:
            left -= tails * np.exp(log_weight)
            place = ((1 - left) / tau - (tails - 1)) * TAIL_STEPS
        inside = -_SLACK <= place <= TAIL_STEPS + _SLACK
        place = min(max(place, 0.0), np.float64(TAIL_STEPS))
        upward = (np.ceil(place) - place) * tau / TAIL_STEPS
        run = value_uniform[s]
        for i in range(indptr[s], indptr[s + 1]):
            if not tail[u(i)] and i != top:
                value = np.exp(np.float64(logprobs[u(i)])) / step
                code = np.floor(value)
                after = run + (value - code)
                code_N[u(i)] = i64(code + np.floor(after) - np.floor(run))
                run = after
                if code_N[u(i)] == 0:
                    group_N[u(i)] = LEFT_OUT
                left -= value * step
        upward += 0.0 if run == value_uniform[s] else step
        if left <= 0:
            return 2, s
        if not inside or left <= upward + 1e-6:
            exact_S[s] = True
            for i in range(indptr[s], indptr[s + 1]):
                if group_N[u(i)] == LEFT_OUT:
                    group_N[u(i)] = HEAD
            continue
        weight_S[s] = np.uint8(np.floor(place + weight_uniform[s]))
        if tails == 1 and weight_S[s] == 0:
            for i in range(indptr[s], indptr[s + 1]):
                if tail[u(i)]:
                    group_N[u(i)] = LEFT_OUT
    return 0, 0


@inlined
def first_groups(
    start: int, end: int, logprobs: NDArray[Any], tail: NDArray[Any], group_N: NDArray[Any]
) -> tuple[int, int, float]:
    """Largest head (-1: none), tail entries (-1: of different weights) and their log weight."""
    top, tails, log_weight = -1, 0, 0.0
    for i in range(start, end):
        group_N[u(i)] = TAIL if tail[u(i)] else HEAD
        if tail[u(i)]:
            if tails and np.float64(logprobs[u(i)]) != log_weight:
                return top, -1, log_weight
            tails, log_weight = tails + 1, np.float64(logprobs[u(i)])
        elif top < 0 or logprobs[u(i)] > logprobs[u(top)]:
            top = i
    return top, tails, log_weight


@inlined
def entries_of(codes: NDArray[Any], more: NDArray[Any], s: int, at: int) -> tuple[int, int, int]:
    """Heads and tails of a position, and the next byte of ``more``: -1 if it runs out."""
    heads, tails = i64(codes[s]) >> 4, i64(codes[s]) & 15
    exact = codes[s] == 0
    if exact or heads == MANY:
        if at + 2 > len(more):
            return 0, 0, -1
        heads += i64(more[u(at)]) | i64(more[u(at + 1)]) << 8
        at += 2
    if exact or tails == MANY:
        if at + 2 > len(more):
            return 0, 0, -1
        tails += i64(more[u(at)]) | i64(more[u(at + 1)]) << 8
        at += 2
    return heads, tails, at


@kernel
def read_counts(
    codes: NDArray[Any], more: NDArray[Any], indptr: NDArray[Any], stored: NDArray[Any]
) -> int:
    """Used bytes of ``more``, or -1 if they run out or a position has no entry.

    Fills how much is ``stored``: entries of top, head and tail, values, weights, exact values, and
    the longest tail.
    """
    at = 0
    for s in range(len(codes)):
        heads, tails, at = entries_of(codes, more, s, at)
        exact = codes[s] == 0
        if at < 0 or heads + tails == 0 or (exact and heads == 0):
            return -1
        top = min(heads, 1)
        others, weights = heads - top, 1 if top and tails else 0
        indptr[s + 1] = indptr[s] + heads + tails
        stored[0] += top
        stored[1] += others
        stored[2] += tails
        if exact:
            stored[5] += others + weights
        else:
            stored[3] += others
            stored[4] += weights
        stored[6] = max(stored[6], tails)
    return at


@kernel
def decode_positions(
    codes: NDArray[Any],
    more: NDArray[Any],
    previous_S: NDArray[Any],
    order: tuple[NDArray[Any], ...],
    runs: tuple[tuple[NDArray[Any], ...], ...],
    values: tuple[NDArray[Any], ...],
    weights: NDArray[Any],
    exact: NDArray[Any],
    tables: tuple[NDArray[Any], ...],
    indptr: NDArray[Any],
    entries: tuple[NDArray[Any], ...],
) -> tuple[int, int]:
    """Status (0: fine, else see ``pps.py``) and position; fills the entries in order of id."""
    (token_of, first), (top, head, tail), (ids_N, logprobs_N, tail_N) = order, runs, entries
    log_mass, log_left, log_count = tables
    ids, places = id_buffers(indptr)
    logprobs, V = np.empty(len(ids), dtype=np.float32), len(first) - 1
    at_top, at_head, at_tail, at_value, at_weight, at_exact = 0, 0, 0, 0, 0, 0
    top_extra, head_extra, tail_extra, value_extra, at_more = 0, 0, 0, 0, 0
    for s in range(len(codes)):
        heads, tails, at_more = entries_of(codes, more, s, at_more)
        tops, others = min(heads, 1), max(heads - 1, 0)
        low, count = successors_of(previous_S[s], first)
        top_extra = read_run(top, at_top, top_extra, tops, token_of, V, low, count, ids, 0)
        head_extra = read_run(head, at_head, head_extra, others, token_of, V, low, count, ids, tops)
        tail_extra = read_run(tail, at_tail, tail_extra, tails, token_of, V, low, count, ids, heads)
        if top_extra < 0 or head_extra < 0 or tail_extra < 0:
            return BAD_RANK, s
        at_top, at_head, at_tail = at_top + tops, at_head + others, at_tail + tails
        log_weight, taken = -log_count[u(tails)], 0
        if codes[s] == 0:
            stored = exact[at_exact : at_exact + heads - 1 + (tails > 0)]
            log_weight = read_exact(stored, heads, tails, logprobs)
            if log_weight > 0:
                return BAD_EXACT, s
            at_exact += len(stored)
        elif tops:
            if tails:
                taken = tail_units(weights[u(at_weight)], tails)
                if not 0 < taken < len(log_mass):
                    return OFF_GRID, s
                log_weight += log_mass[u(taken)]
                at_weight += 1
            taken, value_extra = read_heads(
                values, at_value, value_extra, heads, taken, log_mass, logprobs
            )
            if taken < 0:
                return OFF_GRID, s
            logprobs[0] = log_left[u(taken)]
            at_value += heads - 1
        if not place(ids, heads + tails, places):
            return TWICE, s
        for j in range(heads + tails):
            slot = indptr[s] + places[u(j)]
            ids_N[u(slot)], tail_N[u(slot)] = ids[u(j)], j >= heads
            logprobs_N[u(slot)] = logprobs[u(j)] if j < heads else log_weight
    used = top_extra == len(top[1]) and head_extra == len(head[1]) and tail_extra == len(tail[1])
    return (0 if used and value_extra == len(values[1]) else UNUSED), len(codes)


@inlined
def tail_units(weight: int, tails: int) -> int:
    """The mass of a tail in units of tau / 6, or zero if there is no such weight."""
    if weight > TAIL_STEPS:
        return 0
    return TAIL_UNITS * (TAIL_STEPS * (tails - 1) + i64(weight))


@inlined
def read_heads(
    values: tuple[NDArray[Any], ...],
    at: int,
    at_extra: int,
    heads: int,
    taken: int,
    log_mass: NDArray[Any],
    logprobs: NDArray[Any],
) -> tuple[int, int]:
    """Fills the heads but the largest; what they and ``taken`` take (-1: too much), next extra."""
    codes, extra = values
    for j in range(1, heads):
        code = i64(codes[u(at + j - 1)])
        if code >= ONE:
            code, at_extra = read_long(code, extra, at_extra)
        taken += HEAD_UNITS * code
        if code <= 0 or taken >= len(log_mass):
            return -1, at_extra
        logprobs[u(j)] = log_mass[u(HEAD_UNITS * code)]
    return taken, at_extra


@kernel
def read_exact(values: NDArray[Any], heads: int, tails: int, logprobs: NDArray[Any]) -> float:
    """Fills the heads of an exact position; the log of the tail's weight, or 1 if it has none."""
    left, log_weight = 1.0, 0.0
    for j in range(len(values)):
        value = np.float64(values[j])
        if not (value <= 0 and value > -np.inf):
            return 1.0
        if j < heads - 1:
            logprobs[j + 1] = value
            left -= np.exp(value)
        else:
            log_weight = value
            left -= tails * np.exp(value)
    logprobs[0] = np.log(left) if left > 0 else 1.0
    return log_weight if left > 0 else 1.0
