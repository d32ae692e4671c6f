"""The Arrow form of a token table: what is written is read, and nothing else is."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdstore.align import TokenTable
from kdstore.errors import HeaderError

TABLE = TokenTable(
    "byte_fallback", (b"<s>", b"\xff", None, b""), np.array([1, 4, 8, 0], np.uint8), True
)


def same(one: TokenTable, other: TokenTable) -> bool:
    return (one.kind, one.bytes_V, one.prefix_space) == (
        other.kind,
        other.bytes_V,
        other.prefix_space,
    ) and np.array_equal(one.flags_V, other.flags_V)


def with_header(**changes: object) -> pa.Table:
    arrow = TABLE.to_arrow()
    header = json.loads(arrow.schema.metadata[b"kdstore"]) | changes
    return arrow.replace_schema_metadata({b"kdstore": json.dumps(header)})


@settings(deadline=None)
@given(st.lists(st.tuples(st.one_of(st.none(), st.binary(max_size=5)), st.sampled_from([0, 1, 6]))))
def test_round_trip(tokens: list[tuple[bytes | None, int]]) -> None:
    flags = [8 if token is None else flag for token, flag in tokens]
    table = TokenTable("unigram", tuple(token for token, _ in tokens), np.array(flags, np.uint8))
    assert same(TokenTable.from_bytes(table.to_bytes()), table)
    assert same(TokenTable.from_arrow(table.to_arrow()), table)


def test_columns_are_plain_arrow() -> None:
    arrow = pa.ipc.open_file(TABLE.to_bytes()).read_all()
    assert arrow.to_pydict() == {
        "id": [0, 1, 2, 3],
        "bytes": [b"<s>", b"\xff", None, b""],
        "flags": [1, 4, 8, 0],
    }
    assert json.loads(arrow.schema.metadata[b"kdstore"]) == {
        "fingerprint": TABLE.fingerprint(),
        "format": "token_table",
        "kind": "byte_fallback",
        "prefix_space": True,
        "version": 1,
    }


def test_path_and_file(tmp_path: Path) -> None:
    path, file = tmp_path / "table.arrow", io.BytesIO()
    TABLE.write(path)
    TABLE.write(file)
    assert path.read_bytes() == file.getvalue() == TABLE.to_bytes()
    file.seek(0)
    assert same(TokenTable.read(path), TABLE)
    assert same(TokenTable.read(file), TABLE)


def test_tables_in_chunks_are_read() -> None:
    arrow = TABLE.to_arrow()
    assert same(TokenTable.from_arrow(pa.concat_tables([arrow[:1], arrow[1:]])), TABLE)


@pytest.mark.parametrize("changes", [{"version": 2}, {"format": "other"}])
def test_other_versions_and_formats_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(HeaderError, match=r"(?s)unknown format or version.*token_table version 1"):
        TokenTable.from_arrow(with_header(**changes))


def test_incomplete_headers_are_refused() -> None:
    with pytest.raises(HeaderError, match="incomplete header"):
        TokenTable.from_arrow(with_header(prefix_space=None))
    for metadata in ({}, {b"kdstore": b"{"}):
        with pytest.raises(HeaderError, match="not a token table"):
            TokenTable.from_arrow(TABLE.to_arrow().replace_schema_metadata(metadata))
    with pytest.raises(HeaderError, match="unknown format"):
        TokenTable.from_arrow(TABLE.to_arrow().replace_schema_metadata({b"kdstore": b"[]"}))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("id", pa.array([0, 2, 1, 3], pa.int32())),
        ("flags", pa.array([1, 4, 8, 32], pa.uint8())),
        ("flags", pa.array([1, 4, 0, 0], pa.uint8())),
        ("flags", pa.array([1, 4, 8, 0], pa.int64())),
    ],
)
def test_contradicting_columns_are_refused(column: str, values: pa.Array) -> None:
    arrow = TABLE.to_arrow()
    where = arrow.schema.get_field_index(column)
    field = pa.field(column, values.type, nullable=False)
    with pytest.raises(HeaderError, match=r"(?s)(contradict|other columns).*where: somewhere"):
        TokenTable.from_arrow(arrow.set_column(where, field, values), where="somewhere")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    data = TABLE.to_bytes()
    path = tmp_path / "table.arrow"
    for damaged in (b"", b"not arrow", data[: len(data) // 2], data[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(HeaderError, match=f"(?s)no readable Arrow file.*{path.name}"):
            TokenTable.read(path)


def test_changed_bytes_are_refused() -> None:
    data = TABLE.to_bytes()
    with pytest.raises(HeaderError, match=r"(?s)changed since.*where: here"):
        TokenTable.from_bytes(data.replace(b"<s>\xff", b"<t>\xff"), where="here")


@settings(deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_written(data: st.DataObject) -> None:
    """Bytes that no reader looks at (padding, field order) may change; the table may not."""
    damaged = bytearray(TABLE.to_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        table = TokenTable.from_bytes(bytes(damaged))
    except HeaderError:
        return
    assert table.bytes_V == TABLE.bytes_V
    assert np.array_equal(table.flags_V, TABLE.flags_V)
