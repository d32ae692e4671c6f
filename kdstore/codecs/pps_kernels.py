"""Compiled loops of the pps codec: rounding positions, and putting them together again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.jit import kernel
from kdstore.codecs.shorts import ONE, read_long

HEAD_STEPS = 2  # grid of head values: tau / 2
TAIL_STEPS = 3  # grid of the tail's mass: tau / 3
UNITS = HEAD_STEPS * TAIL_STEPS  # tau / 6, of which both are multiples
HEAD_UNITS, TAIL_UNITS = UNITS // HEAD_STEPS, UNITS // TAIL_STEPS
MANY = 15  # a count's nibble that says: more in the plane of that name
TOP, HEAD, TAIL, LEFT_OUT = range(4)
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

    Fills the entries' groups (``LEFT_OUT`` for what rounds to zero), head codes, weight codes and
    exact positions.
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
        for i in range(indptr[s], indptr[s + 1]):
            group_N[i] = TAIL if tail[i] else HEAD
        if top < 0:
            continue
        group_N[top] = TOP
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
                    group_N[i] = LEFT_OUT
                left -= value * step
        upward += 0.0 if run == value_uniform[s] else step
        if left <= 0:
            return 2, s
        if not inside or left <= upward + 1e-6:
            exact_S[s] = True
            for i in range(indptr[s], indptr[s + 1]):
                if group_N[i] == LEFT_OUT:
                    group_N[i] = HEAD
            continue
        weight_S[s] = np.uint8(np.floor(place + weight_uniform[s]))
        if tails == 1 and weight_S[s] == 0:
            for i in range(indptr[s], indptr[s + 1]):
                if tail[i]:
                    group_N[i] = LEFT_OUT
    return 0, 0


@kernel
def read_counts(
    codes: NDArray[Any], more: NDArray[Any], lengths_GS: NDArray[Any], exact_S: NDArray[Any]
) -> tuple[int, int, int, int]:
    """Used bytes of ``more``, or -1 if they run out or a position has no entry.

    Then how many values, weights and exact values there must be. Fills the lengths of the runs.
    """
    at, num_values, num_weights, num_exact = 0, 0, 0, 0
    for s in range(len(codes)):
        exact = codes[s] == 0
        heads, tails = int(codes[s]) >> 4, int(codes[s]) & 15
        if exact or heads == MANY:
            if at + 2 > len(more):
                return -1, 0, 0, 0
            heads += int(more[at]) | int(more[at + 1]) << 8
            at += 2
        if exact or tails == MANY:
            if at + 2 > len(more):
                return -1, 0, 0, 0
            tails += int(more[at]) | int(more[at + 1]) << 8
            at += 2
        if heads + tails == 0 or (exact and heads == 0):
            return -1, 0, 0, 0
        top = min(heads, 1)
        exact_S[s] = exact
        lengths_GS[0, s], lengths_GS[1, s], lengths_GS[2, s] = top, heads - top, tails
        weights = 1 if top and tails else 0
        if exact:
            num_exact += heads - top + weights
        else:
            num_values += heads - top
            num_weights += weights
    return at, num_values, num_weights, num_exact


@kernel
def read_values(
    indptr: NDArray[Any],
    places_N: NDArray[Any],
    lengths_GS: NDArray[Any],
    exact_S: NDArray[Any],
    values: tuple[NDArray[Any], ...],
    weights: NDArray[Any],
    exact: NDArray[Any],
    tables: tuple[NDArray[Any], ...],
    logprobs_N: NDArray[Any],
    tail_N: NDArray[Any],
) -> tuple[int, int]:
    """Status (0: fine, else see ``pps.py``) and position; entries go to their ``places_N``."""
    codes, extra = values
    log_mass, log_left, log_count = tables
    at, at_extra, at_weight, at_exact = 0, 0, 0, 0
    for s in range(len(exact_S)):
        heads, tails, first = lengths_GS[0, s] + lengths_GS[1, s], lengths_GS[2, s], indptr[s]
        log_top, log_weight = 0.0, -log_count[tails]
        if exact_S[s]:
            log_top, log_weight = read_exact(
                exact[at_exact : at_exact + heads - 1 + (tails > 0)], heads, tails
            )
            if log_top == -np.inf:
                return 3, s
            for j in range(1, heads):
                logprobs_N[first + places_N[first + j]] = exact[at_exact + j - 1]
            at_exact += heads - 1 + (tails > 0)
        elif heads:
            taken = 0
            if tails:
                code = int(weights[at_weight])
                if code > TAIL_STEPS or (tails == 1 and code == 0):
                    return 1, s
                taken = TAIL_UNITS * (TAIL_STEPS * (tails - 1) + code)
                if taken >= len(log_left):
                    return 2, s
                log_weight += log_mass[taken]
                at_weight += 1
            for j in range(1, heads):
                code = int(codes[at + j - 1])
                if code >= ONE:
                    code, at_extra = read_long(code, extra, at_extra)
                if code <= 0:
                    return 1, s
                taken += HEAD_UNITS * code
                if taken >= len(log_left):
                    return 2, s
                logprobs_N[first + places_N[first + j]] = log_mass[HEAD_UNITS * code]
            at += heads - 1
            log_top = log_left[taken]
        if heads:
            logprobs_N[first + places_N[first]] = log_top
        for j in range(first, first + heads):
            tail_N[first + places_N[j]] = False
        for j in range(first + heads, indptr[s + 1]):
            logprobs_N[first + places_N[j]], tail_N[first + places_N[j]] = log_weight, True
    return (0 if at_extra == len(extra) else 4), len(exact_S)


@kernel
def read_exact(values: NDArray[Any], heads: int, tails: int) -> tuple[float, float]:
    """Logs of the largest head and of the tail's weight; -inf unless something is left."""
    left, log_weight = 1.0, 0.0
    for j in range(len(values)):
        value = np.float64(values[j])
        if not (value <= 0 and value > -np.inf):
            return -np.inf, 0.0
        if j == heads - 1:
            log_weight = value
        left -= np.exp(value) * (tails if j == heads - 1 else 1)
    return (np.log(left) if left > 0 else -np.inf), log_weight
