"""What ``benchmarks.load`` loads: a store of many samples, and its content as plain arrays.

A teacher scores texts once. Its tokens and signals, end to end, are cut into samples of mixed
lengths, again and again from other places until there are enough: the same signals under new ids.
A row group holds none of them twice where there are as many scored tokens as one has, so zstd finds
no more repeats than elsewhere. Peers get what a reader of the store gets, entries as rounded by it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

import kdstore
from benchmarks import distillkit_layout
from benchmarks.peers.arrays import PER_ENTRY, PER_POSITION, PER_RUN, PER_TOKEN
from benchmarks.scored import MAX_LENGTH, SELECTIONS, Scored, Text, keys_of, logits_of
from kdstore.sample import Sample
from kdstore.select import DEFAULT_SCALARS, parse_selection, select
from kdstore.signal import SparseSignal
from kdstore.teachers.hf_load import load_tokenizer

MEDIAN_LENGTH, SPREAD, SHORTEST, LONGEST = 400, 0.8, 16, 4096
_CHUNK = 1 << 10  # rows of the Parquet file that are written together


def read_windows(teacher: str, data: Path, *, tokens: int) -> list[Text]:
    """Texts cut into windows of 512 tokens, in order, until there are enough."""
    tokenizer = load_tokenizer(Path(teacher))
    found: list[Text] = []
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = np.array(tokenizer(row["text"], verbose=False)["input_ids"], dtype=np.int32)
        for start in range(0, len(ids) - 1, MAX_LENGTH):
            found.append(Text(f"{row['id']}#{start}", ids[start : start + MAX_LENGTH]))
            tokens -= len(found[-1].ids_T)
            if tokens <= 0:
                return found
    return found


def score_stream(teacher: str, windows: Sequence[Text], names: Sequence[str]) -> Scored:
    """Windows and their signals; of what ``Scored`` holds, what a store is made of."""
    signals: dict[str, list[SparseSignal]] = {name: [] for name in names}
    vocab_size = 0
    for text, logits in logits_of(teacher, windows):
        vocab_size = logits.shape[1]
        labels, keys = torch.from_numpy(text.ids_T[1:].astype(np.int64)), keys_of([text])
        for name in names:
            rule = parse_selection(SELECTIONS[name])
            signals[name].append(
                select(logits, labels, selection=rule, keys=keys, scalars=DEFAULT_SCALARS)
            )
    whole = {name: SparseSignal.concat(parts) for name, parts in signals.items()}
    return _scored(list(windows), vocab_size, whole)


def repeated(scored: Scored, name: str, *, tokens: int) -> Scored:
    """Samples of mixed lengths, cut from the tokens that have a signal, with that signal."""
    stream = np.concatenate([text.ids_T[1:] for text in scored.texts])
    places = _stretches(len(stream), tokens)
    texts = [Text(f"sample-{n}", stream[first:last]) for n, (first, last) in enumerate(places)]
    rows = np.concatenate([np.arange(first + 1, last) for first, last in places])
    return _scored(texts, scored.vocab_size, {name: scored.signals[name][rows]})


def write_payload(
    folder: Path, store: kdstore.Store, *, tokens: int | None, batch_tokens: int
) -> dict[str, float]:
    """Write all samples, or the first of so many tokens, as ``peers.arrays`` has them; their sums.

    Every side must come to these sums, see ``peers.arrays.content``.
    """
    samples = _first(store, tokens)
    signal = SparseSignal.concat([_signal(sample) for sample in samples])
    columns = {
        "input_ids": (PER_TOKEN, np.concatenate([sample.input_ids_T for sample in samples])),
        "runs": (PER_RUN, np.array([sample.runs for sample in samples], np.int32).reshape(-1)),
        "counts": (PER_POSITION, signal.entries_S.astype(np.uint16)),
        "ids": (PER_ENTRY, signal.ids_N),
        "logprobs": (PER_ENTRY, signal.logprobs_N.astype(np.float16)),
        **{name: (PER_POSITION, values) for name, values in _scalars(signal).items()},
    }
    lengths = {
        PER_TOKEN: [sample.num_tokens for sample in samples],
        PER_RUN: [2 * len(sample.runs) for sample in samples],
        PER_POSITION: [sample.num_scored for sample in samples],
        PER_ENTRY: [_signal(sample).num_entries for sample in samples],
    }
    folder.mkdir()
    for name, (_, values) in columns.items():
        np.save(folder / f"{name}.npy", values)
    for axis, each in lengths.items():
        np.save(folder / f"splits_{axis}.npy", np.cumsum([0, *each], dtype=np.int64))
    axes = {name: axis for name, (axis, _) in columns.items()}
    about = {"axes": axes, "batch_tokens": batch_tokens, "store": store.folder.url}
    (folder / "payload.json").write_text(json.dumps(about))
    if signal.selection == SELECTIONS["topk50"]:
        _write_distillkit(folder / "distillkit.parquet", samples)
    return _sums(samples, signal)


def _sums(samples: Sequence[Sample], signal: SparseSignal) -> dict[str, float]:
    labels = [int(sample.input_ids_T[sample.positions_S].sum()) for sample in samples]
    lengths = [sample.num_tokens for sample in samples]
    return {
        "tokens": sum(lengths),
        "input_ids": sum(int(sample.input_ids_T.sum()) for sample in samples),
        "position_ids": sum(length * (length - 1) // 2 for length in lengths),
        "samples": len(samples),
        "positions": len(signal),
        "labels": sum(labels) - 100 * (sum(lengths) - len(signal)),
        "indptr": signal.num_entries,
        "entries": signal.num_entries,
        "ids": int(signal.ids_N.sum(dtype=np.int64)),
        "logprobs": float(signal.logprobs_N.sum(dtype=np.float64)),
    }


def _scored(texts: list[Text], vocab_size: int, signals: dict[str, SparseSignal]) -> Scored:
    return Scored(texts, vocab_size, signals, {}, np.zeros(0))


def _stretches(length: int, tokens: int) -> list[tuple[int, int]]:
    """Half-open ranges of a stream, one after the other, of about so many tokens in all."""
    draws = np.random.default_rng(0)
    found: list[tuple[int, int]] = []
    at = total = 0
    while total < tokens:
        wanted = int(np.exp(np.log(MEDIAN_LENGTH) + SPREAD * draws.standard_normal()))
        end = min(at + min(max(wanted, SHORTEST), LONGEST), length)
        if end - at < SHORTEST:
            at = int(draws.integers(0, LONGEST))  # so that the next round cuts elsewhere
            continue
        found.append((at, end))
        total, at = total + end - at, end
    return found


def _first(store: kdstore.Store, tokens: int | None) -> list[Sample]:
    samples = list(store)
    ends = np.cumsum([sample.num_tokens for sample in samples])
    return samples if tokens is None else samples[: int(np.searchsorted(ends, tokens, "right"))]


def _signal(sample: Sample) -> SparseSignal:
    if sample.signal is None:
        raise AssertionError(f"sample {sample.sample_id} has no signal")
    return sample.signal


def _scalars(signal: SparseSignal) -> dict[str, NDArray[np.float32]]:
    """The scalars, and the rest where it is not zero throughout."""
    rest = {"rest": signal.rest_S} if np.isfinite(signal.rest_S).any() else {}
    return {**signal.scalars, **rest}


def _write_distillkit(file: Path, samples: Sequence[Sample]) -> None:
    """The Parquet file that DistillKit's writer makes, in its own schema."""
    nested = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", nested),
            ("bytepacked_indices", nested),
        ]
    )
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(samples), _CHUNK):
            some = samples[start : start + _CHUNK]
            cells = distillkit_layout.cells(SparseSignal.concat([_signal(s) for s in some]))
            exact = cells["exact"].view(np.uint8).reshape(-1, 2)
            fitted = cells["coefficients"].view(np.uint8).reshape(len(exact), -1)
            splits = np.cumsum([0, *(sample.num_scored for sample in some)])
            columns: dict[str, Any] = {
                "input_ids": _tokens(some),
                "compressed_logprobs": _nested(np.concatenate([exact, fitted], 1), splits),
                "bytepacked_indices": _nested(cells["ids"], splits),
            }
            writer.write_table(pa.table(columns, schema=schema))


def _tokens(samples: Iterable[Sample]) -> pa.Array:
    return pa.array([s.input_ids_T.astype(np.uint64) for s in samples], pa.list_(pa.uint64()))


def _nested(bytes_SB: NDArray[np.uint8], splits: NDArray[np.int64]) -> pa.Array:
    width = bytes_SB.shape[1]
    inner = pa.ListArray.from_arrays(
        pa.array(np.arange(0, bytes_SB.size + 1, width, dtype=np.int32)),
        pa.array(np.ascontiguousarray(bytes_SB).reshape(-1)),
    )
    return pa.ListArray.from_arrays(pa.array(splits.astype(np.int32)), inner)
