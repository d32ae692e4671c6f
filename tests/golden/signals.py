"""The signals of golden stores: a teacher of seeded, peaked logits, and positions at the edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from kdstore.audit import audit_runs
from kdstore.hashing import RowKeys
from kdstore.sample import Sample
from kdstore.select import parse_selection, select
from kdstore.signal import SparseSignal
from tests.golden.recipes import Recipe

SEED = 7
Rows = NDArray[np.float32]


def scored(
    recipe: Recipe, samples: list[Sample], *, draw: int, scalars: tuple[str, ...] | None = None
) -> list[Sample]:
    """The samples with signals of a draw, and with audits where the recipe has them."""
    wanted = recipe.scalars if scalars is None else scalars
    return [_scored(recipe, sample, draw, wanted or recipe.scalars) for sample in samples]


def reward(sample: Sample) -> Rows:
    """A scalar of the caller's with infinities, a negative zero and a denormal number."""
    values = np.linspace(-1, 1, sample.num_scored, dtype=np.float32)
    values[:5] = np.array([np.inf, -np.inf, -0.0, 1e-45, 3.4e38], np.float32)[: len(values)]
    return values


def logits_of(recipe: Recipe, sample: Sample) -> Rows:
    """float32 [S, V]: logits that fall with the log of a random rank, some steeply."""
    S, V = sample.num_scored, recipe.vocab_size
    random = np.random.default_rng([SEED, len(sample.sample_id), S, V])
    rows = np.empty((S, V), np.float32)
    for row in rows:
        row[:] = -random.uniform(0.8, 4) * np.log1p(random.permutation(V))
        row += random.normal(0, 0.3, V)
    if sample.sample_id == "edges":
        edges = _edge_rows(V)
        rows[: len(edges)] = edges
    return rows


def _edge_rows(vocab_size: int) -> Rows:
    """One token, three, twenty alike, all alike, a tail of 1e-9, sixteen heads and a tail."""
    p = np.zeros((6, vocab_size))
    p[0, vocab_size - 1] = 1
    p[1, [1, 5, 9]] = 0.5, 0.3, 0.2
    p[2, 10:30] = 1 / 20
    p[3] = 1 / vocab_size
    p[4] = 1e-9 / (vocab_size - 1)
    p[4, 7] = 1 - 1e-9
    p[5] = 0.01 / (vocab_size - 16)
    p[5, 3:19] = 0.99 / 16
    with np.errstate(divide="ignore"):
        return np.log(p).astype(np.float32)


def _scored(recipe: Recipe, sample: Sample, draw: int, scalars: tuple[str, ...]) -> Sample:
    logits = torch.from_numpy(logits_of(recipe, sample))
    labels = torch.from_numpy(sample.input_ids_T[sample.positions_S].astype(np.int64))
    positions = [(sample.sample_id, sample.positions_S)]
    keys = RowKeys.of_samples(positions, seed=SEED, draw=draw)
    selection = parse_selection(recipe.selection)
    signal = select(logits, labels, selection=selection, keys=keys, scalars=scalars)
    if sample.sample_id == "edges":
        signal = _edge_scalars(_with_edges(signal))
    sample = replace(sample, signal=signal, audit=None)
    if not recipe.audit_fraction:
        return sample
    runs = audit_runs(sample, fraction=recipe.audit_fraction, seed=SEED)
    audited = replace(sample, runs=runs)
    rows = torch.from_numpy(np.flatnonzero(np.isin(sample.positions_S, audited.positions_S)))
    full = select(
        logits[rows],
        labels[rows],
        selection=parse_selection("full"),
        keys=keys[rows.numpy()],
        scalars=(),
    )
    return replace(sample, audit=replace(audited, signal=full))


def _with_edges(signal: SparseSignal) -> SparseSignal:
    """The last positions replaced by ones that no teacher gives, but a codec can hold."""
    edges = _EDGES.get(signal.selection.partition(":")[0], [])
    places = range(len(signal) - len(edges), len(signal))
    parts = [_edge(signal[s : s + 1], *edge) for s, edge in zip(places, edges, strict=True)]
    return SparseSignal.concat([signal[: len(signal) - len(edges)], *parts])


def _edge(like: SparseSignal, heads: list[float], tails: list[float], rest: float) -> SparseSignal:
    """One position with these probabilities at the ids 0, 2, 4, …, and a log rest."""
    with np.errstate(divide="ignore"):
        logprobs = np.log([*heads, *tails])
    tail = None if like.tail_N is None else [False] * len(heads) + [True] * len(tails)
    return SparseSignal.from_arrays(
        like.selection,
        [0, len(logprobs)],
        2 * np.arange(len(logprobs)),
        logprobs,
        rest_S=[rest],
        tail_N=tail,
        scalars=like.scalars,
    )


_NONE = -np.inf
# heads, tails, log rest. Of pps: two exact positions, one of them with many entries.
_EDGES: dict[str, list[tuple[list[float], list[float], float]]] = {
    "pps": [
        ([0.1] * 8, [0.2], _NONE),
        ([0.03] * 20, [0.4 / 30] * 30, _NONE),
        ([1.0], [], _NONE),
    ],
    "topk": [
        ([], [], 0.0),
        ([0.75, 0.25], [], -200.0),
        ([1e-9, 1e-10], [], float(np.log1p(-1.1e-9))),
        ([1.0, 1e-30], [], _NONE),
    ],
    "topp": [([], [], 0.0), ([0.75, 0.25], [], -200.0), ([1.0, 1e-30], [], _NONE)],
}


def _edge_scalars(signal: SparseSignal) -> SparseSignal:
    """Scalars that are none, infinite, beyond their grid, or minus zero."""
    scalars = {name: values.copy() for name, values in signal.scalars.items()}
    edges = {
        "label_logprob": [-np.inf, -2000, -0.0],
        "label_rank": [np.inf, 2**24, 255, 256, 1],
        "entropy": [np.inf, 2000, 0],
    }
    for name, values in scalars.items():
        some = np.array(edges.get(name, [np.inf, -np.inf, -0.0, 1e-45]), np.float32)
        values[: len(some)] = some
    return replace(signal, scalars=scalars)
