"""Entries as a DataFrame, row by row against the samples they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kdstore
from kdstore.errors import StoreNotFoundError, UsageError
from kdstore.readers.store import Store
from kdstore.writers.overlay import add_scalar
from tests.readers.test_scan import GOLDEN

Dump = Callable[..., Path]
SHARED = {
    "sample_id": pl.String,
    "index": pl.Int64,
    "position": pl.Int32,
    "token": pl.Int32,
    "entry_id": pl.Int32,
    "logprob": pl.Float32,
}
OWN = {"pps": {"tail": pl.Boolean}, "counts": {"count": pl.Int32}}


def reference(store: Store, indices: list[int]) -> list[dict[str, Any]]:
    """One dictionary per entry."""
    rows = []
    for index in indices:
        sample = store[index]
        signal = sample.signal
        assert signal is not None
        for s, position in enumerate(sample.positions_S.tolist()):
            for n in range(signal.indptr[s], signal.indptr[s + 1]):
                row = {
                    "sample_id": sample.sample_id,
                    "index": index % len(store),
                    "position": position,
                    "token": int(sample.input_ids_T[position]),
                    "entry_id": int(signal.ids_N[n]),
                    "logprob": float(signal.logprobs_N[n]),
                    "rest": float(signal.rest_S[s]),
                    **{name: float(values[s]) for name, values in signal.scalars.items()},
                }
                if signal.tail_N is not None:
                    row["tail"] = bool(signal.tail_N[n])
                if signal.counts_N is not None:
                    row["count"] = int(signal.counts_N[n])
                rows.append(row)
    return rows


@pytest.mark.parametrize("name", ["pps-50257", "counts-50", "topk-50", "topp-5000"])
def test_entries_are_those_of_the_samples(name: str) -> None:
    store = kdstore.open(GOLDEN / name)
    scored = [i for i, sample in enumerate(store) if sample.num_scored]
    indices = [scored[1], scored[0], scored[1] - len(store)]
    frame = kdstore.explode(store, indices)
    assert len(frame) > len(indices)
    assert frame.to_dicts() == [
        {name: row[name] for name in frame.columns} for row in reference(store, indices)
    ]
    scalars = kdstore.open(GOLDEN / name).decoder.codec.scalars
    own = OWN.get(name.partition("-")[0], {})
    expected = {**SHARED, **own, "rest": pl.Float32, **dict.fromkeys(scalars, pl.Float32)}
    assert {**frame.schema} == {**frame.schema, **expected}
    assert frame.columns[: len(SHARED) + len(own) + 1] == [*SHARED, *own, "rest"]


@pytest.mark.parametrize("name", ["pps-50257", "counts-50", "topk-50"])
def test_no_samples_and_no_entries_have_the_same_columns(name: str) -> None:
    store = kdstore.open(GOLDEN / name)
    full = kdstore.explode(store, range(len(store)), token_text=True)
    unscored = [i for i, sample in enumerate(store) if not sample.num_scored]
    assert unscored
    for indices in ([], unscored):
        empty = kdstore.explode(GOLDEN / name, indices, token_text=True)
        assert empty.height == 0
        assert empty.schema == full.schema
    assert full["index"].unique().to_list() == [i for i in range(len(store)) if i not in unscored]


def test_an_empty_store_has_the_columns(dump: Dump) -> None:
    url = dump(unit="0/2")
    schema = kdstore.explode(url, [0], token_text=True).schema
    for path in (url / "commits").iterdir():
        path.unlink()
    assert kdstore.explode(url, [], token_text=True).schema == schema
    with pytest.raises(IndexError, match="sample 0"):
        kdstore.explode(url, [0])


def test_indices_of_a_scan(dump: Dump) -> None:
    url = dump()
    chosen = kdstore.scan(url).filter(pl.col("sample_id").is_in(["row-3", "row-50"]))
    frame = kdstore.explode(url, chosen.collect()["index"])
    assert frame["sample_id"].unique(maintain_order=True).to_list() == ["row-3", "row-50"]
    masses = frame.group_by("index", "position").agg(pl.col("logprob").cast(pl.Float64).exp().sum())
    assert masses["logprob"].to_list() == pytest.approx([1.0] * len(masses), abs=1e-6)


def test_tokens_have_their_text(dump: Dump) -> None:
    store = kdstore.open(dump())
    table = store.token_table()
    frame = kdstore.explode(store, [4], token_text=True)
    assert frame.columns[3:7] == ["token", "token_text", "entry_id", "entry_text"]
    assert frame.drop("token_text", "entry_text").equals(kdstore.explode(store, [4]))
    tokens = frame.unique("position", maintain_order=True)
    text = "".join(tokens["token_text"].to_list())
    assert text.encode() == table.decode(store[4].input_ids_T[1:])
    for row in frame.iter_rows(named=True):
        spelled = table.bytes_V[row["entry_id"]]
        assert spelled is not None
        assert row["entry_text"] == spelled.decode(errors="backslashreplace")
    assert frame.filter(pl.col("entry_text").str.contains(r"^\\x[0-9a-f]{2}$")).height > 0


def test_scalars_of_overlays_are_columns(dump: Dump) -> None:
    url = dump()
    add_scalar(url, "surprise", lambda s: -s.signal.scalars["label_logprob"])  # type: ignore[union-attr]
    frame = kdstore.explode(url, [2])
    assert frame["surprise"].to_list() == (-frame["label_logprob"]).to_list()
    assert kdstore.explode(url, []).schema == frame.schema
    add_scalar(url, "position", lambda s: s.signal.scalars["label_logprob"])  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="position"):
        kdstore.explode(url, [2])
    assert "surprise" in kdstore.explode(kdstore.open(url, overlays=["surprise"]), [2]).columns


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        kdstore.explode(tmp_path / "nothing", [0])
