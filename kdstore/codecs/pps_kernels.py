"""Compiled loops of the pps codec: rounding positions, and putting them together again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.jit import kernel
from kdstore.codecs.sorting import sort_keys

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
def assemble(
    indptr: NDArray[Any],
    counts: tuple[NDArray[Any], ...],
    ids: tuple[NDArray[Any], ...],
    values: tuple[NDArray[Any], ...],
    tables: tuple[NDArray[Any], ...],
    ids_N: NDArray[Any],
    logprobs_N: NDArray[Any],
    tail_N: NDArray[Any],
) -> tuple[int, int]:
    """Status (0: fine) and position; fills the entries, ascending by id."""
    heads_S, tails_S, exact_S = counts
    top_ids, head_ids, tail_ids = ids
    codes, weights, exact = values
    log_mass, log_left, log_count = tables
    longest = 0
    for s in range(len(heads_S)):
        longest = max(longest, indptr[s + 1] - indptr[s])
    keys = np.empty(longest, dtype=np.int64)
    logprobs = np.empty(longest, dtype=np.float32)
    at_top, at_head, at_tail, at_code, at_weight, at_exact = 0, 0, 0, 0, 0, 0
    for s in range(len(heads_S)):
        heads, tails = heads_S[s], tails_S[s]
        start, n = indptr[s], heads + tails
        log_weight, taken = -log_count[tails], np.int64(0)
        if exact_S[s]:
            left = np.float64(1)
            for j in range(1, heads + (tails > 0)):
                value = exact[at_exact]
                if not (value <= 0 and value > -np.inf):
                    return 3, s
                if j < heads:
                    logprobs[j] = value
                    left -= np.exp(np.float64(value))
                else:
                    log_weight = value
                    left -= tails * np.exp(np.float64(value))
                at_exact += 1
            if not left > 0:
                return 2, s
            logprobs[0] = np.log(left)
        elif heads:
            if tails:
                code = np.int64(weights[at_weight])
                if code > TAIL_STEPS or (tails == 1 and code == 0):
                    return 1, s
                mass = TAIL_UNITS * (TAIL_STEPS * (tails - 1) + code)
                taken += mass
                at_weight += 1
                if taken >= len(log_left):
                    return 2, s
                log_weight += log_mass[mass]
            for j in range(1, heads):
                code = np.int64(codes[at_code])
                taken += HEAD_UNITS * code
                if code == 0 or taken >= len(log_left):
                    return 1, s
                logprobs[j] = log_mass[HEAD_UNITS * code]
                at_code += 1
            logprobs[0] = log_left[taken]
        if heads:
            keys[0] = np.int64(top_ids[at_top]) << 32
            at_top += 1
        for j in range(1, heads):
            keys[j] = np.int64(head_ids[at_head]) << 32 | j
            at_head += 1
        for j in range(heads, n):
            keys[j] = np.int64(tail_ids[at_tail]) << 32 | j
            logprobs[j] = log_weight
            at_tail += 1
        sort_keys(keys, n)
        last = np.int64(-1)
        for j in range(n):
            slot = keys[j] & 0xFFFFFFFF
            token = keys[j] >> 32
            if token == last:
                return 4, s
            ids_N[start + j], last = token, token
            logprobs_N[start + j] = logprobs[slot]
            tail_N[start + j] = slot >= heads
    return 0, 0
