"""Harm by chance: one mutation of a golden store for each seed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdstore.hashing import json_digest
from kdstore.layout import commit_path
from kdstore.pages import _COMPRESSED
from kdstore.thrift import read_struct
from tests.golden.arrays import store_names
from tests.hostile import commit_bytes, edit_json, parquet_bytes, shard_file, with_cells

Random = np.random.Generator
NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 255, 2**31, 2**63, 2**64, 10**30, -(2**40), 0.5, 1e308, -0.0),
    *("", "x", "../x", "main", "\u0000", "漢" * 100, "9" * 5000, "pps:tau=0.001", "full"),
    *([], [None], [[]], ["entropy"] * 2, {}, {"main": {}}, {"": 1}),
)


@dataclass(frozen=True)
class Mutation:
    """What a seed does: to which store, of which kind, and how."""

    store: str
    kind: str
    apply: Callable[[Path], None]

    @property
    def hides(self) -> bool:
        """Whether digests were made anew, so that other content is not damage."""
        return self.kind not in ("shard bytes", "file bytes")


def mutation(seed: int) -> Mutation:
    """The mutation of a seed."""
    random = np.random.default_rng([seed, 20_251])
    names = [name for name in store_names() if "00000" not in name or random.random() < 0.1]
    kind = str(random.choice(list(_KINDS), p=[0.1, 0.1, 0.35, 0.15, 0.15, 0.08, 0.07]))
    store = names[random.integers(len(names))]
    return Mutation(store, kind, lambda path: _KINDS[kind](path, random))


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """Bytes with flips, a cut, something put in, something repeated, or a constant run."""
    bad = bytearray(data)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(len(bad) + 1))
        length = int(random.integers(1, max(2, min(64, len(bad)))))
        noise = random.integers(0, 256, length, dtype=np.uint8).tobytes()
        match random.integers(7):
            case 0 if bad:
                bad[min(at, len(bad) - 1)] ^= 1 << random.integers(8)
            case 1:
                del bad[at : at + length]
            case 2:
                bad[at:at] = noise
            case 3:
                bad[at : at + length] = noise[: max(0, len(bad) - at)]
            case 4:
                start = int(random.integers(len(bad) + 1))
                bad[at:at] = bad[start : start + length]
            case 5:
                value = int(random.choice([0, 1, 127, 128, 191, 192, 247, 248, 253, 254, 255]))
                bad[at : at + length] = bytes([value]) * len(bad[at : at + length])
            case _:
                del bad[at:]
    return bytes(bad)


def _folders(store: Path) -> list[Path]:
    return [store, *sorted((store / "overlays").glob("*"))]


def _shard_bytes(store: Path, random: Random) -> None:
    """A shard's file, any of its bytes; its commit stays."""
    folders = _folders(store)
    shard = shard_file(folders[random.integers(len(folders))], int(random.integers(2)))
    shard.write_bytes(mutated_bytes(shard.read_bytes(), random))


def _file_bytes(store: Path, random: Random) -> None:
    """Any other file."""
    files = sorted(p for p in store.rglob("*") if p.is_file() and p.parent.name != "data")
    path = files[random.integers(len(files))]
    path.write_bytes(mutated_bytes(path.read_bytes(), random))


def _cells(store: Path, random: Random) -> None:
    """Cells of a row, with hashes and checksums that hold: the codec sees them."""
    folders = _folders(store)
    folder, unit = folders[random.integers(len(folders))], int(random.integers(2))
    table = pq.read_table(shard_file(folder, unit))
    row = int(random.integers(len(table)))
    names = [name for name in table.column_names if not name.endswith("row_hash")]
    cells = {}
    for index in random.choice(len(names), size=random.integers(1, 4), replace=False):
        column = table[names[index]]
        cells[names[index]] = _other_cell(column[row].as_py(), column.to_pylist(), random)
    commit_bytes(folder, parquet_bytes(with_cells(table, row, cells)), unit)


def _other_cell(cell: Any, column: list[Any], random: Random) -> Any:
    if random.random() < 0.1:
        return column[random.integers(len(column))]
    if isinstance(cell, bytes):
        return mutated_bytes(cell, random)
    if isinstance(cell, str):
        return mutated_bytes(cell.encode(), random).decode(errors="replace")
    if isinstance(cell, int):
        return int(random.choice([0, -1, 1, cell + 1, 2**31 - 1, -(2**31)]))
    if isinstance(cell, list) and cell and isinstance(cell[0], dict):
        index, key = random.integers(len(cell)), random.choice(["start", "end"])
        return [*cell[:index], {**cell[index], key: int(random.choice([-1, 0, 9, 2**31 - 1]))}]
    if isinstance(cell, list) and cell:
        index = random.integers(len(cell))
        value = int(random.choice([-1, 0, 49, 50, 2**31 - 1, -(2**31)]))
        return [*cell[:index], value, *cell[index + random.integers(2) :]]
    return cell


def _parquet(store: Path, random: Random) -> None:
    """Bytes of the Parquet file, most often of its footer, committed with hashes that hold."""
    folders = _folders(store)
    folder, unit = folders[random.integers(len(folders))], int(random.integers(2))
    data = shard_file(folder, unit).read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if random.random() < 0.3:
        commit_bytes(folder, mutated_bytes(data[:start], random) + data[start:], unit)
        return
    footer = mutated_bytes(data[start:-8], random)
    tail = len(footer).to_bytes(4, "little") + b"PAR1"
    commit_bytes(folder, data[:start] + footer + tail, unit)


def _pages(store: Path, random: Random) -> None:
    """Bytes of a page before compression: levels, lengths and values, with right checksums."""
    folders = _folders(store)
    folder, unit = folders[random.integers(len(folders))], int(random.integers(2))
    table = pq.read_table(shard_file(folder, unit))
    data = parquet_bytes(table, compression="none")
    metadata = pq.read_metadata(pa.BufferReader(data)).row_group(0)
    column = metadata.column(int(random.integers(metadata.num_columns)))
    start = column.data_page_offset
    head, body = read_struct(data, start)
    end = body + head[_COMPRESSED]
    for _ in range(20):
        page = mutated_bytes(data[body:end], random)[: end - body].ljust(end - body, b"\0")
        old, new = (_zigzag_bytes(_signed(zlib.crc32(p))) for p in (data[body:end], page))
        if len(old) == len(new) and old in data[start:body]:
            header = data[start:body].replace(old, new)
            commit_bytes(folder, data[:start] + header + page + data[end:], unit)
            return


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def _zigzag_bytes(value: int) -> bytes:
    """A number as Thrift's compact protocol has it."""
    number, out = value << 1 if value >= 0 else (-value << 1) - 1, bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _identity(store: Path, random: Random) -> None:
    """A field of the identity, with every digest made anew: commits and shards agree with it."""
    header = json.loads((store / "kdstore.json").read_text())
    _change_field(header["identity"], random)
    header["config_digest"] = digest = json_digest(header["identity"])
    (store / "kdstore.json").write_text(json.dumps(header))
    for commit in sorted((store / "commits").iterdir()):
        unit = int(commit.stem)
        edit_json(commit, lambda content: content.update(config_digest=digest))
        table = pq.read_table(shard_file(store, unit))
        metadata = {"kdstore": json.dumps({"config_digest": digest})}
        commit_bytes(store, parquet_bytes(table.replace_schema_metadata(metadata)), unit)


def _fields(store: Path, random: Random) -> None:
    """A field of a header or commit."""
    folders = _folders(store)
    folder = folders[random.integers(len(folders))]
    paths = ["kdstore.json" if folder == store else "overlay.json", commit_path(0), commit_path(1)]
    edit_json(folder / str(random.choice(paths)), lambda content: _change_field(content, random))


def _change_field(content: Any, random: Random) -> None:
    """Another value somewhere in an object, or a field less, or one more."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return
        key = keys[random.integers(len(keys))]
        inner = content[key]
        if isinstance(inner, dict | list) and inner and random.random() < 0.8:
            content = inner
            continue
        value = NASTY[random.integers(len(NASTY))]
        match random.integers(8):
            case 0:
                del content[key]
            case 1 if isinstance(inner, int):
                content[key] = inner + int(random.choice([-1, 1]))
            case 2 if isinstance(inner, str):
                content[key] = mutated_bytes(inner.encode(), random).decode(errors="replace")
            case _:
                content[key] = value
        return


_KINDS: dict[str, Callable[[Path, Random], None]] = {
    "shard bytes": _shard_bytes,
    "file bytes": _file_bytes,
    "cells": _cells,
    "parquet": _parquet,
    "pages": _pages,
    "identity": _identity,
    "fields": _fields,
}
