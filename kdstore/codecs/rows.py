"""A sample's plain columns, its runs, and the hash that covers its whole row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from kdstore.codecs.planes import Plane
from kdstore.errors import CorruptShardError, InputError
from kdstore.hashing import canonical_json
from kdstore.sample import Sample, Span

RUNS = "runs"
SPAN_TYPE = pa.struct(
    [("start", pa.int32()), ("end", pa.int32()), ("kind", pa.string()), ("supervised", pa.bool_())]
)
PLAIN_COLUMNS = {
    "sample_id": pa.string(),
    "num_tokens": pa.int32(),
    "num_scored": pa.int32(),
    "input_ids": pa.list_(pa.int32()),
    "spans": pa.list_(SPAN_TYPE),
    "text": pa.string(),
    "messages": pa.string(),
    "metadata": pa.string(),
}
MAX_SPANS = 1 << 20  # of a sample
MAX_JSON_CHARS = 1 << 26  # of messages, or of metadata
_NULL = (1 << 64) - 1


def plain_arrays(samples: Sequence[Sample]) -> dict[str, pa.Array]:
    """The plain columns of samples as Arrow arrays; InputError for what no reader would read."""
    for sample in samples:
        if len(sample.spans) > MAX_SPANS:
            raise InputError(
                "a sample has too many spans",
                where=f"sample {sample.sample_id!r}",
                expected=f"at most {MAX_SPANS}",
                got=len(sample.spans),
            )
    ids = [sample.input_ids_T for sample in samples]
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    offsets = np.cumsum([0, *map(len, ids)]).astype(np.int32)
    values: dict[str, list[Any]] = {
        "sample_id": [sample.sample_id for sample in samples],
        "num_tokens": [sample.num_tokens for sample in samples],
        "num_scored": [sample.num_scored for sample in samples],
        "spans": [[span_dict(span) for span in sample.spans] for sample in samples],
        "text": [sample.text for sample in samples],
        "messages": [_json_text(sample.messages) for sample in samples],
        "metadata": [_json_text(sample.metadata) for sample in samples],
    }
    arrays = {name: pa.array(column, PLAIN_COLUMNS[name]) for name, column in values.items()}
    arrays["input_ids"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()))
    return {name: arrays[name] for name in PLAIN_COLUMNS}


def span_dict(span: Span) -> dict[str, Any]:
    """A span as the struct that is stored."""
    return {
        "start": span.start,
        "end": span.end,
        "kind": span.kind,
        "supervised": span.supervised,
    }


def encode_runs(samples: Sequence[Sample]) -> Plane:
    """The runs of samples as little-endian int32 pairs (start, end)."""
    flat = [bound for sample in samples for run in sample.runs for bound in run]
    offsets = np.cumsum([0, *(8 * len(sample.runs) for sample in samples)], dtype=np.int64)
    return Plane(np.frombuffer(np.array(flat, dtype="<i4").tobytes(), dtype=np.uint8), offsets)


def decode_runs(
    cell: bytes, *, num_tokens: int, num_scored: int | None
) -> tuple[tuple[int, int], ...]:
    """The runs in a cell; CorruptShardError unless they ascend inside the sample and cover S.

    Where ``num_scored`` is None, any number of positions will do.
    """
    if len(cell) % 8:
        raise CorruptShardError(
            "plane 'runs' holds no pairs", expected="8 bytes a run", got=len(cell)
        )
    bounds = np.frombuffer(cell, dtype="<i4").tolist()
    runs = tuple(zip(bounds[::2], bounds[1::2], strict=True))
    previous, covered = 1, 0
    for start, end in runs:
        if not previous <= start < end <= num_tokens:
            covered = -1
            break
        previous, covered = end, covered + end - start
    if covered < 0 or num_scored not in (None, covered):
        raise CorruptShardError(
            "scored runs do not fit the sample",
            expected=f"{'some' if num_scored is None else num_scored} positions "
            f"within [1, {num_tokens})",
            got=bounds[:8],
        )
    return runs


def row_hashes(columns: Iterable[str], cells: Mapping[str, Sequence[Any]]) -> list[int]:
    """xxh3_64 over each row: each column's name, then its cell as ``cell_bytes`` gives it."""
    parts: list[list[bytes | memoryview]] = []
    for name in columns:
        prefix, column = name.encode("utf-8"), cells[name]
        if not (column and isinstance(column[0], memoryview | bytes)):
            column = list(map(cell_bytes, column))
        lengths = [_NULL if cell is None else len(cell) for cell in column]
        parts.append([prefix + length.to_bytes(8, "little") for length in lengths])
        parts.append([cell or b"" for cell in column])
    # One call a row, which has many short cells.
    return [xxhash.xxh3_64_intdigest(b"".join(row)) for row in zip(*parts, strict=True)]


def cell_bytes(cell: Any) -> bytes | memoryview | None:
    """The bytes of a cell that the row hash covers; None for a null.

    Bytes as they are, text in UTF-8, integers as 8 bytes and integer arrays as 4 bytes an element,
    both little-endian, lists of spans as canonical JSON.
    """
    if isinstance(cell, memoryview | bytes) or cell is None:
        return cell
    if isinstance(cell, str):
        return cell.encode("utf-8")
    if isinstance(cell, int):
        return cell.to_bytes(8, "little", signed=True)
    if isinstance(cell, np.ndarray):
        return np.ascontiguousarray(cell, dtype="<i4").tobytes()
    return canonical_json(cell)


def _json_text(value: Any) -> str | None:
    text = None if value is None else json.dumps(value, ensure_ascii=False)
    if text is not None and len(text) > MAX_JSON_CHARS:
        raise InputError(
            "messages or metadata of a sample are too large",
            expected=f"at most {MAX_JSON_CHARS} characters of JSON",
            got=f"{len(text)}: {text[:40]} …",
        )
    return text
