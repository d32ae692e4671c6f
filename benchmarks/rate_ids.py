"""Variants of ids: runs, planes, orders, and the least that they could cost."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from benchmarks.scored import Scored, Text, find_entries, order_of
from benchmarks.streams import (
    Numbers,
    Row,
    adaptive_bytes,
    entropy_bytes,
    low_high_bytes,
    run_gaps,
    shorts_bytes,
    zstd_bytes,
)
from kdstore.codecs import IdOrder, Plane, codec_for
from kdstore.codecs.order import Successors
from kdstore.codecs.shorts import decode_shorts
from kdstore.signal import SparseSignal

TOP, HEAD, TAIL = 0, 1, 2


class Stored:
    """What the codec of a selection stores: its planes, its entries, and the part of each."""

    def __init__(self, scored: Scored, name: str, order: IdOrder) -> None:
        self.order, self.positions = order, scored.positions
        self.original = scored.signals[name]
        codec = codec_for(self.original.selection, order=order, scalars=())
        self.planes: dict[str, Plane] = codec.encode(self.original, self.positions)
        self.signal: SparseSignal = codec.decode(self.planes, self.positions.previous_S)

    @property
    def S(self) -> int:
        """Positions."""
        return len(self.signal)

    @cached_property
    def group_N(self) -> Numbers:
        """Of pps: 0 for the largest head of a position, 1 for other heads, 2 for tails."""
        tail_N = self.original.tail_N
        assert tail_N is not None
        order = np.lexsort((-self.original.logprobs_N, tail_N, self.original.rows_N))
        first = order[self.original.indptr[:-1]]
        groups = np.where(tail_N, TAIL, HEAD)
        groups[first[groups[first] == HEAD]] = TOP
        return groups[find_entries(self.original, self.signal)]

    def gaps(self, runs_N: Numbers, order: IdOrder | None = None) -> tuple[Numbers, Numbers]:
        """Gaps of runs, and the entry of each, in an order or that of the store."""
        previous = self.positions.previous_S[self.signal.rows_N]
        return run_gaps(self.signal.ids_N, previous, runs_N, order or self.order)

    def per_position(self, sizes: dict[str, float]) -> dict[str, float]:
        """Bytes per position."""
        return {name: size / self.S for name, size in sizes.items()}


def runs_and_planes(scored: Scored, order: IdOrder) -> Iterator[Row]:
    """How entries of a position are cut into runs, and streams into planes."""
    for name in ("pps06", "pps16"):
        stored = Stored(scored, name, order)
        rows, group = stored.signal.rows_N, stored.group_N
        tail = (group == TAIL).astype(np.int64)
        counts = zstd_bytes(stored.planes["counts"].data.tobytes())
        entries = shorts_bytes(stored.signal.entries_S)
        gaps, at = stored.gaps(rows)
        marks = entries + zstd_bytes(group[at].astype(np.uint8).tobytes())
        first = _first(rows[at])
        yield f"{name}.runs.one", stored.per_position(_run_sizes(gaps, ~first * 1, marks))
        gaps, at = stored.gaps(rows * 2 + tail)
        marks = counts + zstd_bytes(_place_of_top(rows[at], group[at]).tobytes())
        yield f"{name}.runs.head_tail", stored.per_position(_run_sizes(gaps, tail[at], marks))
        gaps, at = stored.gaps(rows * 3 + group)
        yield f"{name}.runs.top_head_tail", stored.per_position(_run_sizes(gaps, group[at], counts))
        first = _first((rows * 3 + group)[at])
        split = np.where((group[at] == TAIL) & first, 3, group[at])
        sizes = _run_sizes(gaps, split, counts)
        yield f"{name}.runs.top_head_tail_first", stored.per_position(sizes)
    yield from _count_runs(Stored(scored, "counts50", order))


def _count_runs(stored: Stored) -> Iterator[Row]:
    """One run with a count for each id, against a run of the ids drawn once."""
    counts = stored.signal.counts_N
    assert counts is not None
    rows, once = stored.signal.rows_N, (counts == 1).astype(np.int64)
    gaps, at = stored.gaps(rows)
    marks = shorts_bytes(stored.signal.entries_S) + shorts_bytes(counts[at].astype(np.int64) - 1)
    sizes = _run_sizes(gaps, ~_first(rows[at]) * 1, marks)
    yield "counts50.runs.one", stored.per_position(sizes)
    gaps, at = stored.gaps(rows * 2 + once)
    planes = ("repeats", "singles", "count")
    marks = sum(zstd_bytes(stored.planes[name].data.tobytes()) for name in planes)
    sizes = _run_sizes(gaps, once[at], marks)
    yield "counts50.runs.repeat_single", stored.per_position(sizes)


def _run_sizes(gaps: Numbers, stream_N: Numbers, marks: int) -> dict[str, float]:
    parts = [gaps[stream_N == stream] for stream in np.unique(stream_N)]
    return {
        "ids": sum(map(shorts_bytes, parts)),
        "ids_one_plane": shorts_bytes(gaps),
        "ids_low_high": sum(map(low_high_bytes, parts)),
        "marks": marks,
        "sum": sum(map(shorts_bytes, parts)) + marks,
    }


def _first(runs_N: Numbers) -> NDArray[np.bool_]:
    return np.asarray(np.diff(runs_N, prepend=-1) != 0)


def _place_of_top(rows_N: Numbers, group_N: Numbers) -> NDArray[np.uint8]:
    """uint8: where the largest stands among the heads of positions with several."""
    heads = rows_N[group_N != TAIL]
    place = np.arange(len(heads)) - np.searchsorted(heads, heads)
    several = np.bincount(heads)[heads] > 1
    return np.asarray(place[(group_N[group_N != TAIL] == TOP) & several], dtype=np.uint8)


def id_orders(scored: Scored) -> Iterator[Row]:
    """Orders of the vocabulary, and successors of the previous token that come first."""
    for label, order in _orders(scored).items():
        found = {"order": len(order.to_bytes()) / len(scored.squares_S)}
        found |= _sampled_ids(scored, order)
        for name in ("topk50", "topp95"):
            stored = Stored(scored, name, order)
            gaps, _ = stored.gaps(stored.signal.rows_N, order)
            found[name] = shorts_bytes(gaps, level=9) / stored.S
        yield f"order.{label}", found


def order_sources(scored: Scored, uncut: list[Text]) -> Iterator[Row]:
    """The same signals in the order that more or less text gives."""
    texts = scored.texts
    sources = {f"1/{n}": texts[::n] for n in (8, 4, 2)} | {"all": texts, "all_uncut": uncut}
    for label, source in sources.items():
        order = order_of(source, scored.vocab_size)
        found = {"tokens": float(sum(len(text.ids_T) for text in source))}
        yield f"order_of.{label}", found | _sampled_ids(scored, order)


def _sampled_ids(scored: Scored, order: IdOrder) -> dict[str, float]:
    """Bytes of the ids of sampled selections, as codecs store them."""
    found = {}
    for name in ("pps06", "pps16", "counts50"):
        stored = Stored(scored, name, order)
        ids = ("top", "head", "tail", "repeat", "single")
        planes = [p for n, p in stored.planes.items() if n.partition("/")[0] in ids]
        found[name] = sum(zstd_bytes(p.data.tobytes()) for p in planes) / stored.S
    return found


def _orders(scored: Scored) -> dict[str, IdOrder]:
    V = scored.vocab_size
    counts = np.bincount(np.concatenate([t.ids_T for t in scored.texts]), minlength=V)
    pairs = [t.ids_T[:-1].astype(np.int64) * V + t.ids_T[1:] for t in scored.texts]
    keys, times = np.unique(np.concatenate(pairs), return_counts=True)
    orders = {"tokenizer": IdOrder.identity(V), "popularity": IdOrder.from_counts(counts)}
    for least in (1, 2, 3, 5):
        previous, following = np.divmod(keys[times >= least], V)
        place = np.lexsort((following, -times[times >= least], previous))
        first = np.searchsorted(previous[place], np.arange(V + 1))
        successors = Successors(first.astype(np.int64), following[place].astype(np.int32))
        orders[f"previous.seen_{least}"] = IdOrder.from_counts(counts, successors)
    return orders


def bounds(scored: Scored, order: IdOrder) -> Iterator[Row]:
    """What each stream costs, against ideal coders of single numbers.

    * ``entropy``: that of the code bytes, plus the extra bytes
    * ``adaptive``: an arithmetic coder that learns as it goes
    * ``context``: one with a model for each number of ids still to come in the run
    * ``text_model``: of ids, as sets, under pair counts of the texts that back off to token counts
      (absolute discounting): more than the order knows, and free of charge
    """
    for name in ("pps06", "pps16"):
        stored = Stored(scored, name, order)
        heads = np.bincount(stored.signal.rows_N[stored.group_N != TAIL], minlength=stored.S)
        streams = {
            "top": np.minimum(heads, 1),
            "head": np.maximum(heads - 1, 0),
            "tail": stored.signal.tail_counts_S,
        }
        bits_N = _text_model_bits(scored, stored)
        rows: list[Row] = []
        for group, (plane, lengths) in enumerate(streams.items()):
            found = _bound(stored, plane, _still_to_come(lengths))
            bits = bits_N[stored.group_N == group].sum() - _log2_factorials(lengths)
            rows.append((plane, {**found, "text_model": float(bits) / 8 / stored.S}))
        for plane in ("value", "counts", "weight"):
            found = _bound(stored, plane, None)
            rows.append((plane, {**found, "text_model": found["adaptive"]}))
        for plane, found in rows:
            yield f"{name}.bound.{plane}", found
        total = {key: sum(found[key] for _, found in rows) for key in rows[0][1]}
        yield f"{name}.bound.sum", total


def _text_model_bits(scored: Scored, stored: Stored) -> NDArray[np.float64]:
    """float64 [N]: -log2 of each entry's probability after its previous token, by text counts."""
    V, discount = scored.vocab_size, 0.75
    singles = np.bincount(np.concatenate([t.ids_T for t in scored.texts]), minlength=V) + 0.5
    pairs = [t.ids_T[:-1].astype(np.int64) * V + t.ids_T[1:] for t in scored.texts]
    keys, times = np.unique(np.concatenate(pairs), return_counts=True)
    after = np.bincount(keys // V, weights=times, minlength=V)
    kinds = np.bincount(keys // V, minlength=V)
    previous = stored.positions.previous_S[stored.signal.rows_N].astype(np.int64)
    wanted = previous * V + stored.signal.ids_N
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    seen = np.where(keys[at] == wanted, times[at] - discount, 0)
    alone = singles[stored.signal.ids_N] / singles.sum()
    shares = (seen + discount * kinds[previous] * alone) / after[previous]
    return np.asarray(-np.log2(shares))


def _log2_factorials(lengths_S: Numbers) -> float:
    table = np.cumsum([0.0, *np.log2(np.arange(1, max(1, int(lengths_S.max())) + 1))])
    return float(table[lengths_S].sum())


def _still_to_come(lengths_S: Numbers) -> Numbers:
    ends = np.repeat(np.cumsum(lengths_S), lengths_S)
    return np.asarray(np.minimum(ends - np.arange(len(ends)), 12))


def _bound(stored: Stored, plane: str, context: Numbers | None) -> dict[str, float]:
    codes = stored.planes[plane].data
    extra = stored.planes[f"{plane}/extra"].data if f"{plane}/extra" in stored.planes else codes[:0]
    values = codes.astype(np.int64)
    if len(extra) or plane in ("top", "head", "tail", "value"):
        values = decode_shorts(stored.planes, plane).astype(np.int64)
    fits = context is not None and len(context) == len(values)
    sizes = {
        "zstd": zstd_bytes(codes.tobytes()) + zstd_bytes(extra.tobytes()),
        "entropy": entropy_bytes(codes) + len(extra),
        "adaptive": adaptive_bytes(values),
        "context": adaptive_bytes(values, context if fits else None),
    }
    return stored.per_position(sizes)
