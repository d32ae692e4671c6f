"""Compiled loops of the pps codec: rounding positions, and putting them together again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.ids import read_run, successors_of
from kdstore.codecs.jit import kernel
from kdstore.codecs.shorts import ONE, read_long
from kdstore.codecs.sorting import id_buffers, place

Stream = tuple[NDArray[Any], ...]  # of shorts: codes, extra bytes

HEAD_STEPS = 2  # grid of head values: tau / 2
TAIL_STEPS = 3  # grid of the tail's mass: tau / 3
UNITS = HEAD_STEPS * TAIL_STEPS  # tau / 6, of which both are multiples
HEAD_UNITS, TAIL_UNITS = UNITS // HEAD_STEPS, UNITS // TAIL_STEPS
MANY = 15  # a count's nibble that says: more in the plane of that name
DROPPED = -1
_SLACK = 1e-3  # of a step: a float32 weight on the edge of its interval


@kernel
def round_positions(
    indptr: NDArray[Any],
    logprobs: NDArray[Any],
    tail: NDArray[Any],
    value_uniform: NDArray[Any],
    weight_uniform: NDArray[Any],
    tau: float,
    code_N: NDArray[Any],
    weight_S: NDArray[Any],
    exact_S: NDArray[Any],
    top_S: NDArray[Any],
) -> tuple[int, int]:
    """Status (0: fine, 1: tail weights differ, 2: nothing left for the largest) and position.

    Fills head codes (``DROPPED`` for what rounds to zero), weight codes, exact positions and the
    largest heads.
    """
    step = tau / HEAD_STEPS
    for s in range(len(indptr) - 1):
        top, tails, log_weight = np.int64(-1), np.int64(0), np.float32(0)
        for i in range(indptr[s], indptr[s + 1]):
            if tail[i]:
                if tails and logprobs[i] != log_weight:
                    return 1, s
                tails, log_weight = tails + 1, logprobs[i]
            elif top < 0 or logprobs[i] > logprobs[top]:
                top = np.int64(i)
        top_S[s] = top
        if top < 0:
            continue
        left, place = 1.0, 0.0  # of the tail's mass between (n - 1) tau and n tau, in steps
        if tails:
            left -= tails * np.exp(np.float64(log_weight))
            place = ((1 - left) / tau - (tails - 1)) * TAIL_STEPS
        inside = -_SLACK <= place <= TAIL_STEPS + _SLACK
        place = min(max(place, 0.0), np.float64(TAIL_STEPS))
        upward = (np.ceil(place) - place) * tau / TAIL_STEPS
        run = value_uniform[s]
        for i in range(indptr[s], indptr[s + 1]):
            if not tail[i] and i != top:
                value = np.exp(np.float64(logprobs[i])) / step
                code = np.floor(value)
                before = np.floor(run)
                run += value - code
                code_N[i] = np.int64(code + np.floor(run) - before)
                if code_N[i] == 0:
                    code_N[i] = DROPPED
                left -= value * step
        upward += 0.0 if run == value_uniform[s] else step
        if left <= 0:
            return 2, s
        if not inside or left <= upward + 1e-6:
            exact_S[s] = True
            for i in range(indptr[s], indptr[s + 1]):
                code_N[i] = 0
            continue
        weight_S[s] = np.uint8(np.floor(place + weight_uniform[s]))
        if tails == 1 and weight_S[s] == 0:
            for i in range(indptr[s], indptr[s + 1]):
                if tail[i]:
                    code_N[i] = DROPPED
    return 0, 0


@kernel
def count_entries(
    codes: NDArray[Any],
    more: NDArray[Any],
    heads_S: NDArray[Any],
    tails_S: NDArray[Any],
    exact_S: NDArray[Any],
) -> int:
    """Bytes of ``more`` used, or -1 if they run out or a position has no entry."""
    at = 0
    for s in range(len(codes)):
        exact = codes[s] == 0
        heads, tails = np.int64(codes[s] >> 4), np.int64(codes[s] & 15)
        if exact or heads == MANY:
            if at + 2 > len(more):
                return -1
            heads += np.int64(more[at]) | np.int64(more[at + 1]) << 8
            at += 2
        if exact or tails == MANY:
            if at + 2 > len(more):
                return -1
            tails += np.int64(more[at]) | np.int64(more[at + 1]) << 8
            at += 2
        if heads + tails == 0 or (exact and heads == 0):
            return -1
        heads_S[s], tails_S[s], exact_S[s] = heads, tails, exact
    return at


@kernel
def decode_positions(
    indptr: NDArray[Any],
    counts: tuple[NDArray[Any], ...],
    previous_S: NDArray[Any],
    order: tuple[NDArray[Any], ...],
    runs: tuple[Stream, ...],
    values: Stream,
    weights: NDArray[Any],
    exact: NDArray[Any],
    tables: tuple[NDArray[Any], ...],
    ids_N: NDArray[Any],
    logprobs_N: NDArray[Any],
    tail_N: NDArray[Any],
) -> tuple[int, int]:
    """Status (0: fine, else see ``pps.py``) and position; fills the entries, ascending by id."""
    heads_S, tails_S, exact_S = counts
    token_of, first_V1 = order
    top, head, tail = runs
    ids, places = id_buffers(indptr)
    logprobs = np.empty(len(ids), dtype=np.float32)
    at_top, at_head, at_tail, at_value, at_weight, at_exact = 0, 0, 0, 0, 0, 0
    top_extra, head_extra, tail_extra, value_extra = 0, 0, 0, 0
    V = len(first_V1) - 1
    for s in range(len(heads_S)):
        heads, tails = heads_S[s], tails_S[s]
        start, n = indptr[s], heads + tails
        low, count = successors_of(previous_S[s], first_V1)
        if heads:
            top_extra = read_run(top, at_top, top_extra, 1, token_of, V, low, count, ids, 0)
            head_extra = read_run(
                head, at_head, head_extra, heads - 1, token_of, V, low, count, ids, 1
            )
            if top_extra < 0 or head_extra < 0:
                return 5, s
            at_top, at_head = at_top + 1, at_head + heads - 1
        tail_extra = read_run(
            tail, at_tail, tail_extra, tails, token_of, V, low, count, ids, heads
        )
        if tail_extra < 0:
            return 5, s
        at_tail += tails
        if exact_S[s]:
            if not read_exact(exact, at_exact, heads, tails, logprobs):
                return 3, s
            at_exact += heads - 1 + (tails > 0)
        else:
            value_extra = read_values(
                values, at_value, value_extra, weights, at_weight, heads, tails, tables, logprobs
            )
            if value_extra < 0:
                return -value_extra, s
            at_value += max(heads - 1, 0)
            at_weight += heads > 0 and tails > 0
        if not place(ids, n, places):
            return 4, s
        for j in range(n):
            slot = start + places[j]
            ids_N[slot] = ids[j]
            logprobs_N[slot] = logprobs[j]
            tail_N[slot] = j >= heads
    used_all = top_extra == len(top[1]) and head_extra == len(head[1])
    used_all = used_all and tail_extra == len(tail[1]) and value_extra == len(values[1])
    return (0 if used_all else 6), len(heads_S)


@kernel
def read_exact(
    exact: NDArray[Any], at: int, heads: int, tails: int, logprobs: NDArray[Any]
) -> bool:
    """Fills the values of an exact position; False unless they leave the largest something."""
    left = np.float64(1)
    for j in range(1, heads):
        value = exact[at + j - 1]
        if not (value <= 0 and value > -np.inf):
            return False
        logprobs[j] = value
        left -= np.exp(np.float64(value))
    if tails:
        value = exact[at + heads - 1]
        if not (value <= 0 and value > -np.inf):
            return False
        logprobs[heads : heads + tails] = value
        left -= tails * np.exp(np.float64(value))
    if not left > 0:
        return False
    logprobs[0] = np.log(left)
    return True


@kernel
def read_values(
    values: Stream,
    at: int,
    at_extra: int,
    weights: NDArray[Any],
    at_weight: int,
    heads: int,
    tails: int,
    tables: tuple[NDArray[Any], ...],
    logprobs: NDArray[Any],
) -> int:
    """Fills the values of a position on the grids; the next extra byte, or minus a status."""
    codes, extra = values
    log_mass, log_left, log_count = tables
    log_weight, taken = -log_count[tails], np.int64(0)
    if heads and tails:
        code = np.int64(weights[at_weight])
        if code > TAIL_STEPS or (tails == 1 and code == 0):
            return -1
        taken = TAIL_UNITS * (TAIL_STEPS * (tails - 1) + code)
        if taken >= len(log_left):
            return -2
        log_weight += log_mass[taken]
    for j in range(1, heads):
        code = np.int64(codes[at + j - 1])
        if code >= ONE:
            code, at_extra = read_long(code, extra, at_extra)
        if code <= 0 or code >= len(log_left):
            return -1
        taken += HEAD_UNITS * code
        if taken >= len(log_left):
            return -2
        logprobs[j] = log_mass[HEAD_UNITS * code]
    if heads:
        logprobs[0] = log_left[taken]
    for j in range(heads, heads + tails):
        logprobs[j] = log_weight
    return at_extra
