"""The Arrow form of a token table, which is the file ``table.arrow`` of a store.

An uncompressed Arrow IPC file of one record batch with the columns ``id`` int32 (0, 1, 2, …),
``bytes`` binary (null where no token has the id) and ``flags`` uint8. Kind, prefix space, the
table's fingerprint and the format version are JSON in the schema's metadata under ``kdstore``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdstore.align.vocabulary import TokenFlag
from kdstore.arrowfile import read_ipc
from kdstore.errors import HeaderError
from kdstore.hashing import canonical_json

FORMAT = "token_table"
FORMAT_VERSION = 1

_METADATA_KEY = b"kdstore"
_HEADER_TYPES = {"kind": str, "prefix_space": bool, "fingerprint": str}
_TODO = "restore tokenizer/table.arrow, or make it anew from tokenizer/tokenizer.json"
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("bytes", pa.binary()),
        pa.field("flags", pa.uint8(), nullable=False),
    ]
)


def build_arrow(
    bytes_V: Sequence[bytes | None], flags_V: NDArray[np.uint8], header: dict[str, Any]
) -> pa.Table:
    """Arrow table [V] of a token table; ``header`` is all but format and version."""
    columns = [
        pa.array(np.arange(len(bytes_V), dtype=np.int32)),
        pa.array(bytes_V, pa.binary()),
        pa.array(flags_V),
    ]
    text = canonical_json(header | {"format": FORMAT, "version": FORMAT_VERSION})
    return pa.Table.from_arrays(columns, schema=_SCHEMA.with_metadata({_METADATA_KEY: text}))


def check_arrow(table: pa.Table, *, where: Any = None) -> dict[str, Any]:
    """The header of an Arrow token table whose columns may be read.

    ``HeaderError`` if it is damaged, of a future version or no token table.
    """
    header = _parse_header(table.schema, where)
    _check_version(header, where)
    _check_schema(table.schema, where)
    _check_values(table, where)
    return header


def check_fingerprint(found: str, header: dict[str, Any], *, where: Any = None) -> None:
    """``HeaderError`` unless the table that was read is the one that was written."""
    if found != header["fingerprint"]:
        raise HeaderError(
            "a token table whose bytes or flags have changed since it was written",
            where=where,
            expected=f"fingerprint {header['fingerprint']}",
            got=found,
            todo=_TODO,
        )


def dump_arrow(table: pa.Table) -> bytes:
    """The bytes of ``table.arrow``; the same table gives the same bytes."""
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def load_arrow(data: bytes, *, where: Any = None) -> pa.Table:
    """The Arrow table of a file's bytes, unchecked; ``HeaderError`` if it is no Arrow file."""
    try:
        table = read_ipc(data)
        _ = table.schema.names  # decodes them, so that a damaged name is found here
    except (pa.ArrowException, OSError, ValueError) as error:
        what = "a token table that is no readable Arrow file"
        raise HeaderError(what, where=where, got=error, todo=_TODO) from error
    return table


def _parse_header(schema: pa.Schema, where: Any) -> dict[str, Any]:
    try:
        header = json.loads((schema.metadata or {})[_METADATA_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        what = "not a token table: its Arrow metadata has no readable 'kdstore' entry"
        raise HeaderError(what, where=where, todo=_TODO) from error
    return header if isinstance(header, dict) else {}


def _check_version(header: dict[str, Any], where: Any) -> None:
    name, version = header.get("format"), header.get("version")
    if (name, version) != (FORMAT, FORMAT_VERSION):
        raise HeaderError(
            "a token table of an unknown format or version",
            where=where,
            expected=f"{FORMAT} version {FORMAT_VERSION}",
            got=f"{name} version {version}",
            todo="read it with the kdstore that wrote it, or a newer one",
        )
    fields = {name: type(header.get(name)) for name in _HEADER_TYPES}
    if fields != _HEADER_TYPES:
        raise HeaderError(
            "a token table with an incomplete header",
            where=where,
            expected=", ".join(_HEADER_TYPES),
            got=header,
            todo=_TODO,
        )


def _check_schema(schema: pa.Schema, where: Any) -> None:
    if not schema.equals(_SCHEMA, check_metadata=False):
        raise HeaderError(
            "a token table with other columns",
            where=where,
            expected=", ".join(f"{field.name} {field.type}" for field in _SCHEMA),
            got=", ".join(f"{field.name} {field.type}" for field in schema),
            todo=_TODO,
        )


def _check_values(table: pa.Table, where: Any) -> None:
    """Refuse columns that would be misread: ids out of order, unknown flags, nulls elsewhere."""
    flags_V = table["flags"].to_numpy()
    unused_V = (flags_V & np.uint8(TokenFlag.UNUSED)) != 0
    fits = (
        np.array_equal(table["id"].to_numpy(), np.arange(len(table)))
        and flags_V.max(initial=0) <= sum(TokenFlag)
        and np.array_equal(table["bytes"].is_null().to_numpy(), unused_V)
    )
    if not fits:
        what = "a token table whose ids, bytes and flags contradict each other"
        raise HeaderError(what, where=where, todo=_TODO)
