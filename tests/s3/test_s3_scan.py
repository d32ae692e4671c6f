"""A store in S3 as a LazyFrame, and its shards for other readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import kdstore
from kdstore.filesystem import Folder

Dump = Callable[..., Path]


def test_scan_and_explode(dump: Dump, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    local, url = dump(), f"{bucket}/stores/one"
    dump(out=url)
    listed: list[str] = []
    names = Folder.names
    monkeypatch.setattr(Folder, "names", lambda *args: listed.append(args[-1]) or names(*args))
    assert_frame_equal(kdstore.scan(url).collect(), kdstore.scan(local).collect())
    query = kdstore.scan(url).filter(pl.col("num_tokens") > 20).select("sample_id", "kept_mass")
    expected = kdstore.scan(local).collect().filter(pl.col("num_tokens") > 20)
    assert_frame_equal(query.collect(), expected.select("sample_id", "kept_mass"))
    assert_frame_equal(kdstore.explode(url, [3]), kdstore.explode(local, [3]))
    assert "data" not in listed


@pytest.mark.parametrize("server", ["moto"])  # rclone answers a range that is all with no range
def test_polars_reads_shards_itself(dump: Dump, bucket: str) -> None:
    url = f"{bucket}/stores/one"
    dump(out=url)
    urls = kdstore.open(url).shard_urls()
    assert all(shard.startswith(f"{url}/data/part-") for shard in urls)
    plain = pl.scan_parquet(urls).select("sample_id", "input_ids").collect()
    assert_frame_equal(plain, kdstore.scan(url).select("sample_id", "input_ids").collect())


def test_datasets_streams_from_s3(dump: Dump, bucket: str) -> None:
    from datasets import load_dataset

    url = f"{bucket}/stores/one"
    dump(out=url)
    urls = kdstore.open(url).shard_urls()
    columns = ["sample_id", "num_tokens"]
    stream = load_dataset(
        "parquet", data_files=urls, columns=columns, split="train", streaming=True
    )
    expected = kdstore.scan(url).select(columns).collect().to_dicts()
    assert list(stream) == expected
