"""Variants of values: grids of topk and pps, and other inclusion probabilities than pps's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.scored import SELECTIONS, Scored, Text, logits_of
from benchmarks.streams import Row, zstd_bytes
from kdstore.codecs.ranked import rest_codes, rest_values, value_classes
from kdstore.hashing import Purpose
from kdstore.signal import SparseSignal, segment_sum

Floats = NDArray[np.float64]
POWER_GRIDS = (
    *((1 / 2, levels) for levels in (127, 196, 255)),
    *((1 / 3, levels) for levels in (31, 63, 107, 127, 255)),
    *((1 / 4, levels) for levels in (31, 63, 100, 127, 255)),
)
LOG_STEPS = (1 / 4, 1 / 8, 1 / 16)
FLOOR = 0.25  # what level 0 decodes to, in levels
INCLUSION_POSITIONS = 4_000


def topk_grids(scored: Scored) -> Iterator[Row]:
    """Bytes of values and KL of rounding for grids of p^a and of log p, in classes and not."""
    signal = scored.signals["topk50"]
    p = np.exp(signal.logprobs_N.astype(np.float64))
    for power, levels in POWER_GRIDS:
        codes = np.rint(p**power * levels).astype(np.uint8)
        values = (np.maximum(codes, FLOOR) / levels) ** (1 / power)
        yield _topk_row(f"topk50.grid.p^1/{1 / power:.0f}.{levels}", signal, codes, values)
    for step in LOG_STEPS:
        codes = np.minimum(np.rint(-signal.logprobs_N / step), 255).astype(np.uint8)
        values = np.exp(-step * codes)
        yield _topk_row(f"topk50.grid.log.1/{1 / step:.0f}", signal, codes, values)


def _topk_row(name: str, signal: SparseSignal, codes: NDArray[np.uint8], values: Floats) -> Row:
    classes = value_classes(rest_codes(signal.rest_S), signal.entries_S)[signal.rows_N]
    parts = [codes[classes == index].tobytes() for index in range(8)]
    S = len(signal)
    found = {
        "bytes": sum(map(zstd_bytes, parts)) / S,
        "bytes_without_classes": zstd_bytes(codes.tobytes()) / S,
        "kl": _kl(signal, values),
    }
    return name, found


def _kl(signal: SparseSignal, values: Floats) -> float:
    """KL of entries and rest to values scaled to what the rest's code leaves."""
    p = np.exp(signal.logprobs_N.astype(np.float64))
    rest = np.exp(signal.rest_S.astype(np.float64))
    total = segment_sum(p, signal.indptr) + rest
    p, rest = p / total[signal.rows_N], rest / total
    log_rest = rest_values(rest_codes(signal.rest_S))
    scale = -np.expm1(log_rest) / segment_sum(values, signal.indptr)
    terms = segment_sum(p * np.log(p / (values * scale[signal.rows_N])), signal.indptr)
    some = rest > 0
    terms[some] += rest[some] * (np.log(rest[some]) - log_rest[some])
    return float(terms.mean())


class Heads(NamedTuple):
    """A pps signal by part: the heads beside the largest, and the tails of positions with one."""

    tau: float
    value_H: Floats
    row_H: NDArray[np.int64]
    tails_S: NDArray[np.int64]
    mass_S: Floats


def _heads(signal: SparseSignal) -> Heads:
    assert signal.tail_N is not None
    p, rows = np.exp(signal.logprobs_N.astype(np.float64)), signal.rows_N
    order = np.lexsort((-p, signal.tail_N, rows))
    largest = np.zeros(len(p), dtype=np.bool_)
    largest[order[signal.indptr[:-1]]] = True
    heads = ~signal.tail_N & ~largest
    headed = np.bincount(rows[~signal.tail_N], minlength=len(signal)) > 0
    tails = np.where(headed, signal.tail_counts_S, 0)
    mass = segment_sum(np.where(signal.tail_N, p, 0), signal.indptr)
    tau = float(signal.selection.partition("tau=")[2])
    return Heads(tau, p[heads], rows[heads], tails, np.where(headed, mass, 0))


def pps_grids(scored: Scored) -> Iterator[Row]:
    """Bytes of head values and tail weights on grids of tau / k, and what rounding adds."""
    keys = scored.positions.keys
    for name in ("pps06", "pps16"):
        heads = _heads(scored.signals[name])
        sampling = scored.variance(name, scored.signals[name])
        for steps in (1, 2, 3, 4, 6, 8):
            u = keys.uniform(Purpose.VALUE_ROUNDING)[:, 0]
            codes, variance = _round_heads(heads, steps, u)
            codes = codes[codes > 0]
            found = _rounding(codes, variance, sampling, len(u))
            yield f"{name}.head_grid.tau/{steps}", found
        for steps in (1, 2, 3, 4, 6, 8):
            u = keys.uniform(Purpose.WEIGHT_ROUNDING)[:, 0]
            codes, variance = _round_tails(heads, steps, u)
            yield f"{name}.tail_grid.tau/{steps}", _rounding(codes, variance, sampling, len(u))


def _rounding(
    codes: NDArray[np.int64], variance: float, sampling: float, S: int
) -> dict[str, float]:
    size = zstd_bytes(np.minimum(codes, 255).astype(np.uint8).tobytes())
    return {"bytes": size / S, "rounding_share": variance / sampling}


def _round_heads(heads: Heads, steps: int, u_S: Floats) -> tuple[NDArray[np.int64], float]:
    """Codes by systematic rounding, and the mean square they are off by, the largest included."""
    step, S = heads.tau / steps, len(u_S)
    x = heads.value_H / step
    fraction = x - np.floor(x)
    first = np.searchsorted(heads.row_H, np.arange(S))[heads.row_H]
    running = np.concatenate([[0], np.cumsum(fraction)])
    before = u_S[heads.row_H] + running[:-1] - running[first]
    codes = np.floor(x) + np.floor(before + fraction) - np.floor(before)
    off = (codes - x) * step
    largest = np.bincount(heads.row_H, weights=off, minlength=S)
    return codes.astype(np.int64), float((np.square(off).sum() + np.square(largest).sum()) / S)


def _round_tails(heads: Heads, steps: int, u_S: Floats) -> tuple[NDArray[np.int64], float]:
    """Codes of the tail's mass that are stored, and the mean square they are off by."""
    some = heads.tails_S > 0
    n, mass = heads.tails_S[some], heads.mass_S[some]
    place = np.clip((mass / heads.tau - (n - 1)) * steps, 0, steps)
    codes = np.floor(place + u_S[some]).astype(np.int64)
    off = (codes - place) * heads.tau / steps
    variance = float((np.square(off) * (1 + 1 / n)).sum() / len(u_S))
    return codes[(codes > 0) | (n > 1)], variance


def inclusion(scored: Scored, teacher: str, *, bytes_per_id: float) -> Iterator[Row]:
    """Inclusion probabilities that go by p^a: variance at as many entries, and at as many bytes.

    Where a < 1 every sampled entry needs a value, which costs the entropy of its weight on a grid
    of a quarter nat and leaves bytes for fewer entries.
    """
    positions, texts = 0, []
    for text in scored.texts:
        if positions < INCLUSION_POSITIONS:
            texts.append(text)
            positions += len(text.ids_T) - 1
    entries = scored.signals["pps06"].entries_S[:positions]
    for power in (1.0, 0.75, 0.5):
        same = _inclusion(teacher, texts, entries, power=power, share=1)
        value_bytes = 0.0 if power == 1 else same["value_bits"] / 8
        share = bytes_per_id / (bytes_per_id + value_bytes)
        fewer = _inclusion(teacher, texts, entries, power=power, share=share)
        found = {
            "value_bytes": value_bytes,
            "variance_same_entries": same["variance"],
            "relative_same_entries": same["relative"],
            "variance_same_bytes": fewer["variance"],
            "relative_same_bytes": fewer["relative"],
        }
        yield f"pps06.inclusion.p^{power:g}", found


def _inclusion(
    teacher: str, texts: list[Text], entries_S: NDArray[np.int64], *, power: float, share: float
) -> dict[str, float]:
    """Sums over tokens of Var and of Var / p, and the entropy of a drawn weight, per position.

    Tokens from tau up are kept; of the other entries that pps has, ``share`` are drawn.
    """
    tau = float(SELECTIONS["pps06"].partition("tau=")[2])
    totals, histogram, start = np.zeros(2), np.zeros(512), 0
    for logits in _chunks(teacher, texts):
        p = logits.softmax(-1)
        tail = p < tau
        sizes = torch.from_numpy(entries_S[start : start + len(p)]) - (~tail).sum(-1)
        start += len(p)
        pi = _probabilities(torch.where(tail, p, 0), sizes.clamp(min=1) * share, power=power)
        drawn = tail & (pi > 0)
        weight = torch.where(drawn, p / pi, 1)
        spread = torch.where(drawn, weight * (1 - pi), 0)  # Var / p
        totals += [float((p * spread).double().sum()), float(spread.double().sum())]
        codes = (weight.clamp(min=1e-12).log() * -4).round().clamp(0, 511).to(torch.int64)
        masses = torch.where(drawn, pi, 0).double().flatten().numpy()
        histogram += np.bincount(codes.flatten().numpy(), masses, minlength=512)
    shares = histogram[histogram > 0] / histogram.sum()
    bits = float(-(shares * np.log2(shares)).sum())
    return {"variance": totals[0] / start, "relative": totals[1] / start, "value_bits": bits}


def _chunks(teacher: str, texts: list[Text]) -> Iterator[torch.Tensor]:
    """Logits of all texts, few enough rows at a time to stay in the cache."""
    for _, logits in logits_of(teacher, texts):
        yield from torch.split(logits, 32)


def _probabilities(tail_p: torch.Tensor, sizes: torch.Tensor, *, power: float) -> torch.Tensor:
    """Inclusion probabilities min(1, c p^a) that sum to ``sizes``; c is found by bisection."""
    score = tail_p.pow(power)
    low, high = torch.full((len(score),), -10.0), torch.full((len(score),), 40.0)
    for _ in range(28):
        middle = (low + high) / 2
        below = (score * middle.exp()[:, None]).clamp_(max=1).sum(-1) < sizes
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (score * high.exp()[:, None]).clamp_(max=1)


def pairs(scored: Scored) -> Iterator[Row]:
    """Two small codes in a byte, against one: zstd's Huffman codes cannot go below a bit a byte."""
    keys = scored.positions.keys
    for name in ("pps06", "pps16"):
        heads, S = _heads(scored.signals[name]), len(keys)
        values = _round_heads(heads, 2, keys.uniform(Purpose.VALUE_ROUNDING)[:, 0])[0]
        weights = _round_tails(heads, 3, keys.uniform(Purpose.WEIGHT_ROUNDING)[:, 0])[0]
        for stream, codes in (("value", values[values > 0] - 1), ("weight", weights)):
            small = np.minimum(codes, 15).astype(np.uint8)
            even = small[: len(small) // 2 * 2]
            found = {
                "bytes": zstd_bytes(small.tobytes()) / S,
                "bytes_paired": zstd_bytes((even[::2] * 16 + even[1::2]).tobytes()) / S,
                "above_15": float((codes > 15).sum() / S),
            }
            yield f"{name}.pairs.{stream}", found
