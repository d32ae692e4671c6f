"""A store as a LazyFrame: the same rows as reading, and only the reads that a query needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

import kdstore
from kdstore.codecs import SignalCodec
from kdstore.errors import CorruptShardError, StoreNotFoundError, UsageError
from kdstore.filesystem import Folder
from kdstore.readers.shard import ShardReader
from kdstore.readers.store import Store
from kdstore.sample import Sample
from tests.conftest import make_texts, run_dump, write_jsonl
from tests.readers.test_store import shard_of

Dump = Callable[..., Path]
GOLDEN = Path(__file__).parents[1] / "golden"
ENGINES = ["in-memory", "streaming"]
PLAIN = ["sample_id", "num_tokens", "num_scored", "input_ids", "spans", "metadata"]
STATISTICS = ["entries", "mean_label_logprob", "mean_entropy", "kept_mass"]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path) -> Path:
    """60 samples in units of several row groups; ids ascend, samples get longer."""
    folder = tmp_path_factory.mktemp("grouped")
    texts = sorted(make_texts(60), key=len)
    rows = [{"id": f"row-{i:02}", "text": text} for i, text in enumerate(texts)]
    data = write_jsonl(folder / "texts.jsonl", rows)
    out = folder / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdstore.writers.shard.ROW_GROUP_BYTES", 4000)
        run_dump("--teacher", teacher_dir, "--data", data, "--out", out, "--unit-tokens", 500)
    return out


@pytest.fixture(scope="module")
def whole(grouped: Path) -> pl.DataFrame:
    return kdstore.scan(grouped).collect()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


class Reads:
    """What is read: columns of row groups, samples that are decoded, bytes of shards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.columns: list[tuple[str, int, str]] = []
        self.shards: set[str] = set()
        self.decoded = 0
        plain, getitems, read = ShardReader.plain, Store.__getitems__, Folder.read_ranges

        def seen_plain(shard: ShardReader, group: int, names: Any) -> Any:
            self.columns += [(shard.record.path, group, name) for name in names]
            return plain(shard, group, names)

        def seen_getitems(store: Store, indices: Any) -> list[Sample]:
            self.decoded += len(indices)
            return getitems(store, indices)

        def seen_read(folder: Folder, path: str, ranges: Any) -> list[bytes]:
            self.shards.add(path)
            return read(folder, path, ranges)

        monkeypatch.setattr(ShardReader, "plain", seen_plain)
        monkeypatch.setattr(Store, "__getitems__", seen_getitems)
        monkeypatch.setattr(Folder, "read_ranges", seen_read)

    def names(self) -> set[str]:
        return {name for _, _, name in self.columns}


def num_groups(store: Store) -> int:
    return len(store.row_groups())


def reference(store: Store) -> pl.DataFrame:
    """The frame, from samples and in float64."""
    units = np.repeat([c.unit for c in store.commits], [c.shard.rows for c in store.commits])
    rows = [
        {"index": i, "unit": int(units[i]), **plain_cells(store, sample), **direct(sample)}
        for i, sample in enumerate(store)
    ]
    return pl.DataFrame(rows, schema=kdstore.scan(store).collect_schema())


def plain_cells(store: Store, sample: Sample) -> dict[str, Any]:
    dumps = partial(json.dumps, ensure_ascii=False)
    spans = [vars(span) for span in sample.spans]
    cells = {
        "sample_id": sample.sample_id,
        "num_tokens": sample.num_tokens,
        "num_scored": sample.num_scored,
        "input_ids": sample.input_ids_T.tolist(),
        "spans": spans,
        "text": sample.text,
        "messages": None if sample.messages is None else dumps(sample.messages),
        "metadata": None if sample.metadata is None else dumps(sample.metadata),
    }
    return {name: cells[name] for name in store.header.identity["columns"]}


def direct(sample: Sample) -> dict[str, Any]:
    signal = sample.signal
    assert signal is not None
    masses = [
        sum(np.exp(np.float64(x)) for x in signal.logprobs_N[a:b])
        for a, b in zip(signal.indptr[:-1], signal.indptr[1:], strict=True)
    ]
    means = {
        "mean_label_logprob": signal.scalars.get("label_logprob", []),
        "mean_entropy": signal.scalars.get("entropy", []),
        "kept_mass": masses,
    }
    count = len(signal)
    return {
        "entries": len(signal.ids_N),
        **{
            name: float(sum(map(float, v)) / count) if len(v) else None for name, v in means.items()
        },
    }


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_the_frame_is_what_samples_say(name: str) -> None:
    """Of every selection, with texts and messages, and samples without scored positions."""
    store = kdstore.open(GOLDEN / name)
    frame = kdstore.scan(GOLDEN / name).collect()
    assert_frame_equal(frame, reference(store), rel_tol=1e-12, abs_tol=0)
    assert frame.columns == ["index", "unit", *store.header.identity["columns"], *STATISTICS]
    unscored = frame.filter(num_scored=0)
    assert unscored.select(STATISTICS).unique().rows() == [(0, None, None, None)]
    kept = frame["kept_mass"].drop_nulls()
    assert (kept < 0.999).any() == name.startswith("top")


def test_rows_of_row_groups_come_in_order(grouped: Path) -> None:
    store = kdstore.open(grouped)
    assert num_groups(store) > len(store.commits) > 2
    assert_frame_equal(kdstore.scan(grouped).collect(), reference(store), rel_tol=1e-12, abs_tol=0)


FILTERS = {
    "number": pl.col("num_tokens") > 45,
    "mirrored": pl.lit(45) <= pl.col("num_scored"),
    "equal": pl.col("sample_id") == "row-17",
    "between": pl.col("num_tokens").is_between(20, 30, closed="none"),
    "in": pl.col("sample_id").is_in(["row-03", "row-41", "row-99"]),
    "nothing": pl.col("num_tokens") < 0,
    "fraction": pl.col("num_tokens") > 45.5,
    "not": ~(pl.col("num_tokens") > 45),
    "unequal": pl.col("num_tokens") != 30,
    "or": (pl.col("num_tokens") < 12) | (pl.col("sample_id") >= "row-55"),
    "and": (pl.col("num_tokens") > 20) & (pl.col("sample_id") < "row-44"),
    "place": (pl.col("unit") == 2) & (pl.col("index") % 2 == 0),
    "between columns": pl.col("num_tokens").is_between(pl.col("num_scored"), 45),
    "many": reduce(or_, [pl.col("num_tokens") == 7 * n for n in range(100)]),
    "two columns": pl.col("num_tokens") > pl.col("num_scored") + 1,
    "list": pl.col("input_ids").list.len() > 45,
    "span": pl.col("spans").list.first().struct.field("supervised"),
    "null": pl.col("mean_entropy").is_not_null(),
    "infinity": (pl.col("mean_label_logprob") > float("-inf")) & (pl.col("num_tokens") > 9),
    "statistic": (pl.col("mean_entropy") > 2.5) & (pl.col("num_tokens") > 20),
    "either": (pl.col("kept_mass") < 0.5) | (pl.col("num_tokens") > 50),
    "literal": pl.lit(True),
    "xor": (pl.col("num_tokens") > 20) ^ (pl.col("num_tokens") > 40),
    "over rows": pl.col("num_tokens") > pl.col("num_tokens").mean(),
    "shifted": pl.col("num_tokens").shift(1) > 40,
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_filter_gives_what_the_frame_filtered_gives(
    grouped: Path, whole: pl.DataFrame, name: str, engine: Any
) -> None:
    lazy, expr = kdstore.scan(grouped), FILTERS[name]
    assert_frame_equal(lazy.filter(expr).collect(engine=engine), whole.filter(expr))
    chosen = lazy.filter(expr).select("spans", "index")
    assert_frame_equal(chosen.collect(engine=engine), whole.filter(expr).select("spans", "index"))
    assert_frame_equal(lazy.head(33).filter(expr).collect(engine=engine), whole[:33].filter(expr))
    assert_frame_equal(lazy.filter(expr).head(5).collect(engine=engine), whole.filter(expr)[:5])
    assert_frame_equal(lazy.filter(expr).tail(3).collect(engine=engine), whole.filter(expr)[-3:])


def test_only_wanted_columns_are_read(grouped: Path, reads: Reads) -> None:
    kdstore.scan(grouped).select("sample_id").collect()
    assert reads.names() == {"sample_id"}
    kdstore.scan(grouped).select("num_tokens").filter(pl.col("num_tokens") > 1).collect()
    assert reads.names() == {"sample_id", "num_tokens"}
    assert reads.decoded == 0


def test_places_and_counts_read_no_column(grouped: Path, reads: Reads) -> None:
    assert kdstore.scan(grouped).select(pl.len()).collect().item() == 60
    assert kdstore.scan(grouped).select("unit", "index").collect().height == 60
    assert not reads.columns


def test_statistics_of_row_groups_spare_them(grouped: Path, reads: Reads) -> None:
    store = kdstore.open(grouped)
    bounds = store.row_groups()
    found = kdstore.scan(grouped).filter(pl.col("sample_id") == "row-31").collect()
    assert found["index"].to_list() == [31]
    assert len({(path, group) for path, group, _ in reads.columns}) == 1
    reads.columns.clear()
    lengths = [store[i].num_tokens for i in range(60)]
    wanted = [max(lengths[a:b]) > 45 for a, b in bounds]
    assert 0 < sum(wanted) < len(bounds)
    kdstore.scan(store).filter(pl.col("num_tokens") > 45).select("num_tokens").collect()
    assert len(reads.columns) == sum(wanted)


def test_other_units_shards_are_not_opened(grouped: Path, reads: Reads) -> None:
    store = kdstore.open(grouped)
    first, end = store.first_rows[2:4].tolist()
    frame = kdstore.scan(grouped).filter(pl.col("unit") == 2).select("index").collect()
    assert frame["index"].to_list() == list(range(first, end))
    picked = kdstore.scan(grouped).filter(pl.col("index").is_in([first, end - 1])).collect()
    assert picked["sample_id"].to_list() == [f"row-{i:02}" for i in (first, end - 1)]
    assert reads.shards == {store.commits[2].shard.path}


def test_further_columns_are_read_where_rows_are_left(grouped: Path, reads: Reads) -> None:
    """A condition on a list has no statistics: its column is read, others only where it holds."""
    store = kdstore.open(grouped)
    condition = pl.col("input_ids").list.len() == store[31].num_tokens
    found = kdstore.scan(grouped).filter(condition).select("index", "spans").collect()
    groups = {
        g for g, (a, b) in enumerate(store.row_groups()) for i in found["index"] if a <= i < b
    }
    counts = [sum(name == n for _, _, n in reads.columns) for name in ("input_ids", "spans")]
    assert counts == [num_groups(store), len(groups)]


def test_signals_are_decoded_for_the_rows_that_are_left(grouped: Path, reads: Reads) -> None:
    long = pl.col("num_tokens") > 45
    count = kdstore.scan(grouped).filter(long).collect().height
    assert reads.decoded == count
    reads.decoded = 0
    both = (pl.col("mean_entropy") > 0) & long
    assert kdstore.scan(grouped).filter(both).select("sample_id").collect().height == count
    assert reads.decoded == count
    reads.decoded = 0
    kdstore.scan(grouped).filter(long).select(PLAIN).collect()
    assert reads.decoded == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_head_stops_early(grouped: Path, reads: Reads, engine: Any) -> None:
    frame = kdstore.scan(grouped).head(3).collect(engine=engine)
    assert frame["index"].to_list() == [0, 1, 2]
    assert reads.decoded == 3
    assert {group for _, group, _ in reads.columns} == {0}
    assert len(reads.shards) == 1


def test_streaming_stops_early_after_a_filter(grouped: Path, reads: Reads) -> None:
    query = kdstore.scan(grouped).filter(pl.col("num_scored") > 0).select("sample_id").head(1)
    assert query.collect(engine="streaming")["sample_id"].to_list() == ["row-00"]
    assert len(reads.columns) < 2 * num_groups(kdstore.open(grouped))


def test_statistics_that_are_null_can_be_asked_for() -> None:
    lazy = kdstore.scan(GOLDEN / "pps-50257")
    found = lazy.filter(pl.col("kept_mass").is_null()).select("num_scored").collect()
    assert found["num_scored"].unique().to_list() == [0]


def test_committed_units_of_an_unfinished_store(dump: Dump, monkeypatch: Any) -> None:
    url = dump(unit="1/3")
    monkeypatch.setattr(Folder, "names", refuse_listing(Folder.names))
    frame = kdstore.scan(url).select("unit", "index", "sample_id").collect()
    store = kdstore.open(url)
    assert not store.is_complete
    assert frame["unit"].unique(maintain_order=True).to_list() == [c.unit for c in store.commits]
    assert frame["sample_id"].to_list() == [sample.sample_id for sample in store]
    assert frame["index"].to_list() == list(range(len(store)))


def refuse_listing(names: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def listed(folder: Folder, path: str = "") -> list[str]:
        assert not path.startswith("data"), path
        return names(folder, path)

    return listed


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_store(dump: Dump, engine: Any) -> None:
    url = dump(unit="0/2")
    for path in (url / "commits").iterdir():
        path.unlink()
    frame = kdstore.scan(url).filter(pl.col("kept_mass") > 0).collect(engine=engine)
    assert frame.schema == kdstore.scan(dump("other")).collect_schema()
    assert frame.height == 0
    assert kdstore.scan(url).select(pl.len()).collect(engine=engine).item() == 0


def test_an_opened_store_with_its_signal(dump: Dump) -> None:
    url = dump(audit_fraction=0.1)
    audit = kdstore.open(url, signal="audit")
    frame = kdstore.scan(audit).collect()
    assert frame["entries"].to_list() == [len(s.signal.ids_N) for s in audit]  # type: ignore[union-attr]
    assert frame["mean_entropy"].null_count() == 60  # the audit has no scalars
    with pytest.raises(UsageError, match="opened store"):
        kdstore.scan(audit, anon=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_queries_have_readers_of_their_own(grouped: Path, engine: Any) -> None:
    """Threads of polars run beside each other, and beside whoever reads the store."""
    store = kdstore.open(grouped)
    lazy = kdstore.scan(store)
    frames = pl.collect_all(
        [lazy, lazy.reverse(), lazy.filter(pl.col("entries") > 0)], engine=engine
    )
    assert frames[0].equals(frames[1].reverse())
    assert frames[0].equals(frames[2])
    joined = lazy.join(lazy.select("index", twice="entries"), on="index").collect(engine=engine)
    assert joined["entries"].equals(joined["twice"], check_names=False)
    assert not store._cache._shards._values


def test_other_file_systems(dump: Dump) -> None:
    import fsspec

    local = dump()
    fs = fsspec.filesystem("memory")
    fs.put(str(local), "/scanned", recursive=True)
    assert_frame_equal(kdstore.scan("memory://scanned").collect(), kdstore.scan(local).collect())
    fs.rm("/scanned", recursive=True)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        kdstore.scan(tmp_path / "nothing")


@pytest.mark.parametrize("engine", ENGINES)
def test_damage_is_found_in_what_is_read(dump: Dump, engine: Any) -> None:
    """And only there: a column that is not read may be damaged."""
    url = dump()
    shard = kdstore.open(url).shard(0)
    chunks = {chunk.column: chunk for chunk in shard._file.groups[0].chunks}
    data = bytearray(shard_of(url).read_bytes())
    chunk = chunks["num_tokens"]
    data[chunk.start + chunk.compressed_bytes - 1] ^= 1
    shard_of(url).write_bytes(data)
    assert kdstore.scan(url).select("sample_id").collect(engine=engine).height == 60
    for columns in (["num_tokens"], ["kept_mass"]):
        with pytest.raises(CorruptShardError, match="group 0"):
            kdstore.scan(url).select(columns).collect(engine=engine)
    shard_of(url).write_bytes(data[:-1])
    with pytest.raises(CorruptShardError, match="size"):
        kdstore.scan(url).select("sample_id").collect(engine=engine)


def test_codecs_are_not_asked_for_plain_columns(dump: Dump, monkeypatch: Any) -> None:
    url = dump()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(SignalCodec, "decode", refuse)
    assert kdstore.scan(url).select(PLAIN).collect().height == 60
