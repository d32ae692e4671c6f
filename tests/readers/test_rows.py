"""Cells of a row group."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from kdstore.codecs.rows import row_hashes
from kdstore.readers.rows import RowGroup


def table() -> pa.Table:
    return pa.table(
        {
            "sample_id": pa.array(["a", "b", "c"]),
            "input_ids": pa.array([[1, 2], [], [3]], pa.list_(pa.int32())),
            "text": pa.array(["x", None, "é"]),
            "plane": pa.array([b"", b"\xff\x01", b"\x80"], pa.large_binary()),
        }
    )


def test_cells_are_what_was_stored() -> None:
    rows = RowGroup(table())
    assert (len(rows), rows.columns) == (3, ["sample_id", "input_ids", "text", "plane"])
    cells = rows.take([1, 0, 2])
    assert (cells["sample_id"], cells["text"]) == (["b", "a", "c"], [None, "x", "é"])
    assert cells["plane"] == [b"\xff\x01", b"", b"\x80"]
    assert [ids.tolist() for ids in cells["input_ids"]] == [[], [1, 2], [3]]
    assert rows.take([])["plane"] == []


def test_parts_of_a_table_and_tables_of_parts() -> None:
    sliced = RowGroup(table().slice(1, 2))
    chunked = RowGroup(pa.concat_tables([table(), table()]))
    for rows, index in ((sliced, 1), (chunked, 5)):
        cells = rows.take([index])
        assert (cells["sample_id"], cells["text"], cells["plane"]) == (["c"], ["é"], [b"\x80"])
        assert cells["input_ids"][0].tolist() == [3]
    assert len(RowGroup(table().slice(0, 0))) == 0


def test_a_view_is_hashed_as_its_bytes() -> None:
    cells = RowGroup(table()).take([1, 2])
    plain = {**cells, "plane": list(map(bytes, cells["plane"]))}
    assert row_hashes(cells, cells) == row_hashes(plain, plain)
    assert len(set(row_hashes(cells, cells))) == 2


@pytest.mark.parametrize("column", ["sample_id", "plane"])
def test_nulls_where_none_may_be(column: str) -> None:
    kind = table().schema.field(column).type
    nulls = table().set_column(table().schema.get_field_index(column), column, [pa.nulls(3, kind)])
    with pytest.raises(ValueError, match=column):
        RowGroup(nulls)


def test_token_ids_that_are_null() -> None:
    ids = pa.array([[1, None], [], [3]], pa.list_(pa.int32()))
    with pytest.raises(ValueError, match="a token id is null"):
        RowGroup(table().set_column(1, "input_ids", ids)).take([0])
    assert np.array_equal(RowGroup(table()).take([0])["input_ids"][0], [1, 2])
