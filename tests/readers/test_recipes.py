"""The Python of docs/recipes.md runs as written, and gives what the store holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kdstore

Dump = Callable[..., Path]
RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"
SECTIONS = re.split(r"\n## ", RECIPES.read_text())[1:]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network, and nothing left in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def run(section: str, store: Path) -> dict[str, Any]:
    """The names that the blocks of a section leave, one after the other."""
    names: dict[str, Any] = {}
    (text,) = [text for text in SECTIONS if text.startswith(section)]
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block.replace("STORE", str(store)), str(RECIPES), "exec"), names)
    return names


def test_any_parquet_reader(dump: Dump) -> None:
    names = run("The plain columns", dump())
    store = kdstore.open(dump())
    assert names["texts"].column_names == names["columns"]
    assert names["texts"]["sample_id"][:] == [sample.sample_id for sample in store]
    assert names["texts"][7]["input_ids"] == store[7].input_ids_T.tolist()
    streamed = [row["num_tokens"] for row in names["stream"]]
    assert streamed == [sample.num_tokens for sample in store]
    assert set(next(iter(names["stream"]))) == set(names["columns"])


def test_many_samples(dump: Dump) -> None:
    names = run("Look at many samples", dump())
    store = kdstore.open(dump())
    means = {
        index: sample.signal.scalars["label_logprob"].astype(float).mean()  # type: ignore[union-attr]
        for index, sample in enumerate(store)
    }
    assert names["hard"]["index"].to_list() == sorted(means, key=means.__getitem__)[:3]
    assert set(names["entries"]["index"]) == set(names["hard"]["index"])
    assert names["least"]["label_logprob"][0] == names["entries"]["label_logprob"].min()


def test_shards_are_the_committed_ones_in_order(
    dump: Dump, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = dump()
    (url / "data" / "part-000000-00000000.parquet").write_bytes(b"an orphan")
    monkeypatch.chdir(url.parent)
    store = kdstore.open(url.name)
    paths = [Path(path) for path in store.shard_urls()]
    assert [path.name.split("-")[1] for path in paths] == [f"{c.unit:06}" for c in store.commits]
    assert all(path.is_absolute() and path.parent == url / "data" for path in paths)
    ids = pl.scan_parquet(store.shard_urls()).select("sample_id").collect()["sample_id"]
    assert ids.to_list() == [f"row-{i}" for i in range(60)]
    assert kdstore.open(f"file://{url}").shard_urls() == store.shard_urls()
