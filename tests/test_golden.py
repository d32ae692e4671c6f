"""Stores that were written once are read for ever, and today's encoders still write their bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import kdstore
from kdstore.codecs import Positions
from kdstore.codecs.rows import span_dict
from kdstore.codecs.shorts import ONE, THREE, TWO
from kdstore.hashing import RowKeys
from kdstore.layout import signal_column
from kdstore.readers.store import Store
from kdstore.readers.verify import verify_store
from kdstore.signal import SparseSignal
from tests.golden.arrays import (
    GOLDEN,
    OVERLAY,
    described,
    load,
    signal_of,
    store_names,
    stream_names,
)
from tests.golden.recipes import RECIPES
from tests.independent_reader import Reader

STORES = store_names()
STREAMS = [(store, stream) for store in STORES for stream in stream_names(load(store))]
MAX_BYTES = 1_500_000


def opened(store: str, stream: str) -> Store:
    """A golden store with one of its signals, or one of its overlays."""
    if stream.startswith(OVERLAY):
        return kdstore.open(GOLDEN / store, overlays=[stream.removeprefix(OVERLAY)])
    return kdstore.open(GOLDEN / store, signal=stream, overlays=())


def draw_of(store: Store) -> int:
    """The draw of the overlay that a store was opened with, 0 without one."""
    return max((overlay.header.draw for overlay in store.overlays.found.values()), default=0)


def test_every_recipe_has_its_store_and_all_are_small() -> None:
    assert sorted(recipe.name for recipe in RECIPES) == STORES
    files = [p for p in GOLDEN.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES


@pytest.mark.parametrize("name", STORES)
def test_a_golden_store_verifies(name: str) -> None:
    report = verify_store(kdstore.open(GOLDEN / name))
    assert report.problems == []
    assert report.num_samples == 8
    header = json.loads((GOLDEN / name / "kdstore.json").read_text())
    assert header["format_version"] == "1.0"


@pytest.mark.parametrize("name", STORES)
def test_samples_are_those_that_were_written(name: str) -> None:
    store = kdstore.open(GOLDEN / name)
    want = described(load(name))
    assert len(store) == len(want)
    for sample, row in zip(store, want, strict=True):
        found = {
            "sample_id": sample.sample_id,
            "input_ids": sample.input_ids_T.tolist(),
            "spans": [span_dict(span) for span in sample.spans],
            "runs": [list(run) for run in sample.runs],
            "text": sample.text,
            "messages": sample.messages,
            "metadata": sample.metadata,
        }
        assert json.dumps(found) == json.dumps(row)  # as text, in which NaN equals itself


@pytest.mark.parametrize(("name", "stream"), STREAMS)
def test_a_golden_signal_decodes_as_ever(name: str, stream: str) -> None:
    store = opened(name, stream)
    signals = [store[index, draw_of(store)].signal for index in range(len(store))]
    want, splits = signal_of(load(name), f"decoded/{stream}")
    found = SparseSignal.concat(signals)  # type: ignore[arg-type]
    assert found.selection == want.selection
    assert np.cumsum([0, *map(len, signals)]).tolist() == splits.tolist()  # type: ignore[arg-type]
    for field in ("indptr", "ids_N", "counts_N", "tail_N"):
        np.testing.assert_array_equal(getattr(found, field), getattr(want, field), field)
    for field in ("logprobs_N", "rest_S"):
        values = getattr(found, field)
        np.testing.assert_allclose(values, getattr(want, field), rtol=2e-7, err_msg=field)
    assert found.scalars.keys() == want.scalars.keys()
    for scalar, values in want.scalars.items():
        np.testing.assert_array_equal(found.scalars[scalar], values, scalar)
        np.testing.assert_array_equal(np.signbit(found.scalars[scalar]), np.signbit(values))


@pytest.mark.parametrize(("name", "stream"), STREAMS)
def test_a_foreign_reader_agrees(name: str, stream: str) -> None:
    overlay = stream.removeprefix(OVERLAY) if stream.startswith(OVERLAY) else ""
    reader = Reader(GOLDEN / name, signal="main" if overlay else stream, overlay=overlay)
    samples, arrays = list(reader), load(name)
    want, splits = signal_of(arrays, f"decoded/{stream}")
    plain = described(arrays)
    assert [s["sample_id"] for s in samples] == [row["sample_id"] for row in plain]
    for row, sample in enumerate(samples):
        for column in ("input_ids", "spans"):
            assert sample[column] == plain[row][column]
        signal = want[int(splits[row]) : int(splits[row + 1])]
        if len(sample["ids"]) or not overlay:  # an overlay of scalars leaves the entries alone
            np.testing.assert_array_equal(sample["indptr"], signal.indptr)
            np.testing.assert_array_equal(sample["ids"], signal.ids_N)
            np.testing.assert_allclose(sample["logprobs"], signal.logprobs_N, rtol=3e-7, atol=1e-7)
            np.testing.assert_allclose(sample["rest"], signal.rest_S, rtol=3e-7)
        if signal.tail_N is not None and len(sample["tail"]):
            np.testing.assert_array_equal(sample["tail"], signal.tail_N)
        for scalar, values in sample["scalars"].items():
            np.testing.assert_allclose(values, signal.scalars[scalar], rtol=1e-7, err_msg=scalar)


@pytest.mark.parametrize(("name", "stream"), STREAMS)
def test_todays_encoder_writes_the_same_bytes(name: str, stream: str) -> None:
    arrays = load(name)
    if f"original/{stream}/splits" not in arrays:
        assert stream == f"{OVERLAY}reward"  # of the caller's, stored bit for bit
        return
    signal, splits = signal_of(arrays, f"original/{stream}")
    store = opened(name, stream)
    samples = [store[index, draw_of(store)] for index in range(len(store))]
    positions = [(sample.sample_id, sample.positions_S) for sample in samples]
    previous = np.concatenate([sample.previous_S for sample in samples])
    seed = store.header.identity["seed"]
    keys = RowKeys.of_samples(positions, seed=seed, draw=draw_of(store))
    overlays = store.overlays.found
    codec, folder = store.decoder.codec, GOLDEN / name
    if overlays:
        (overlay,) = overlays
        codec = store.overlays.reader(overlay, codec)._decoder.codec
        folder = GOLDEN / name / "overlays" / overlay
    planes = codec.encode(signal, Positions(keys, splits, previous))
    assert set(planes) == set(codec.planes)
    columns = stored_columns(folder)
    for plane in codec.planes:
        cells = columns[signal_column("main" if overlays else stream, plane)]
        assert [planes[plane].cell(row) for row in range(len(cells))] == cells, plane


def stored_columns(folder: Path) -> dict[str, list[bytes]]:
    """All cells of the shards of a store or overlay, by column."""
    columns: dict[str, list[bytes]] = {}
    for shard in sorted((folder / "data").iterdir()):
        table = pq.read_table(shard)
        for column in table.column_names:
            columns.setdefault(column, []).extend(table[column].to_pylist())
    return columns


def test_golden_stores_reach_the_corners_of_the_format() -> None:
    """Codes of every length, exact and long positions, empty ones, every class of values."""
    cells = {name: stored_columns(GOLDEN / name) for name in STORES}
    found = np.concatenate([shorts_of(columns) for columns in cells.values()])
    for low, high in ((0, ONE), (ONE, TWO), (TWO, THREE), (THREE, 255), (255, 256)):
        assert ((found >= low) & (found < high)).sum() >= 5, (low, high)
    pps = cells["pps-50257"]
    counts = np.frombuffer(b"".join(pps["signal/main/counts"]), np.uint8)
    assert {0, 0x10, 0xF0} <= set(counts.tolist())
    assert (counts >> 4 == 15).any()
    assert (counts & 15 == 15).any()
    assert len(b"".join(pps["signal/main/exact"])) >= 4 * (8 + 20)
    topk, topp = cells["topk-131072"], cells["topp-5000"]
    values = [f"signal/main/value/{index}" for index in range(8)]
    assert [any(topk[plane] + topp[plane]) for plane in values] == [True] * 8
    entries = np.frombuffer(b"".join(topk["signal/main/entries"]), np.uint8)
    assert 0 in entries
    assert 50 in entries


def shorts_of(columns: dict[str, list[bytes]]) -> np.ndarray:
    """All codes of the shorts of a store's columns."""
    names = [name.removesuffix("/extra") for name in columns if name.endswith("/extra")]
    return np.frombuffer(b"".join(cell for name in names for cell in columns[name]), np.uint8)
