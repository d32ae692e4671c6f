"""Only what is asked for is read and decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdstore
from kdstore.errors import CorruptShardError, UsageError
from kdstore.parquet import CheckedParquet
from kdstore.readers.dataset import PositionFilter
from kdstore.writers.overlay import add_scalar

Dump = Callable[..., Path]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The columns that are read of any shard."""
    columns: set[str] = set()
    read_group = CheckedParquet.read_groups

    def seen(file: CheckedParquet, groups: Any, names: list[str]) -> Any:
        columns.update(names)
        return read_group(file, groups, names)

    monkeypatch.setattr(CheckedParquet, "read_groups", seen)
    return columns


ALWAYS = {"sample_id", "num_tokens", "num_scored", "input_ids", "signal/main/runs"}


def test_scalars_alone(dump: Dump, read: set[str]) -> None:
    store = kdstore.open(dump())
    whole = list(store)
    everything = set(read)
    read.clear()
    few = list(store.with_columns(["label_logprob"]))
    planes = {name for name in everything if name.startswith("signal/main/label_logprob")}
    assert planes
    assert read == ALWAYS | planes
    for one, other in zip(whole, few, strict=True):
        assert (one.sample_id, one.runs) == (other.sample_id, other.runs)
        np.testing.assert_array_equal(one.input_ids_T, other.input_ids_T)
        assert one.signal is not None
        assert other.signal is not None
        assert set(other.signal.scalars) == {"label_logprob"}
        assert (len(other.signal), other.signal.num_entries) == (len(one.signal), 0)
        np.testing.assert_array_equal(
            one.signal.scalars["label_logprob"], other.signal.scalars["label_logprob"]
        )
    assert whole[0].spans
    assert not few[0].spans


def test_entries_without_scalars_and_spans(dump: Dump, read: set[str]) -> None:
    store = kdstore.open(dump())
    batches = list(store.loader(batch_size=7, columns=["entries"]))
    assert not any("entropy" in name or "label" in name or name == "spans" for name in read)
    for batch, whole in zip(batches, store.loader(batch_size=7), strict=True):
        assert batch.sample_ids == whole.sample_ids
        assert batch.signal.ids_N.tolist() == whole.signal.ids_N.tolist()
        assert not batch.signal.scalars


def test_plain_columns_are_there_if_asked_for(dump: Dump) -> None:
    store = kdstore.open(dump())
    stored = store.header.identity["columns"]
    assert "metadata" in stored
    (sample,) = store.with_columns(["spans"]).__getitems__([3])
    assert sample.spans == store[3].spans
    assert sample.signal is not None
    assert sample.signal.selection == "none"


def test_overlays_are_read_if_their_scalars_are_wanted(dump: Dump, read: set[str]) -> None:
    path = dump()
    dump(overlay="d1", draw=1)
    add_scalar(str(path), "twice", lambda sample: 2 * sample.signal.scalars["entropy"])  # type: ignore[union-attr]
    store = kdstore.open(path)
    read.clear()
    sample = store.with_columns(["entropy"])[3, 1]
    assert set(sample.signal.scalars) == {"entropy"}  # type: ignore[union-attr]
    assert not any("twice" in name for name in read)
    both = store.with_columns(["twice", "entries"])
    assert set(both[3].signal.scalars) == {"twice"}  # type: ignore[union-attr]
    drawn = both[3, 1].signal
    assert drawn is not None
    np.testing.assert_array_equal(drawn.ids_N, store[3, 1].signal.ids_N)  # type: ignore[union-attr]
    assert set(drawn.scalars) == {"twice"}


def test_what_the_store_does_not_have_is_refused(dump: Dump) -> None:
    store = kdstore.open(dump())
    with pytest.raises(UsageError, match=r"no such column[\s\S]*label_rank[\s\S]*got: entropie"):
        store.with_columns(["entropie"])
    with pytest.raises(UsageError, match="got: input_ids"):
        store.loader(batch_size=2, columns=["input_ids", "entries"])


def test_losses_refuse_a_signal_whose_entries_were_not_read(dump: Dump) -> None:
    import torch

    store = kdstore.open(dump())
    batch = next(iter(store.loader(batch_size=4, columns=["label_logprob"])))
    logits = torch.zeros(*batch.input_ids.shape, store.vocab_size)
    with pytest.raises(UsageError, match='add "entries" to columns'):
        kdstore.losses.forward_kl(logits, batch)
    assert torch.isfinite(kdstore.losses.ce(logits, batch))


def test_a_filter_needs_its_columns(dump: Dump) -> None:
    store = kdstore.open(dump())
    keep = PositionFilter(entropy=(0, 1))
    with pytest.raises(UsageError, match="entropy"):
        next(iter(store.loader(batch_size=4, columns=["entries"], keep=keep)))
    assert next(iter(store.loader(batch_size=4, columns=["entries", "entropy"], keep=keep)))
    kinds = PositionFilter(kinds=("text",))
    with pytest.raises(UsageError, match='add "spans" to columns'):
        store.loader(batch_size=4, columns=["entries"], keep=kinds)
    batch = next(iter(store.loader(batch_size=4, columns=["entries", "spans"], keep=kinds)))
    assert len(batch.signal) > 0
    with pytest.raises(UsageError, match="several names"):
        PositionFilter(kinds="text")  # type: ignore[arg-type]


def test_damage_in_what_is_read_is_found(dump: Dump) -> None:
    path = dump()
    shard = path / kdstore.open(path).commits[0].shard.path
    good = shard.read_bytes()
    reference = [s.signal.ids_N for s in kdstore.open(path)]  # type: ignore[union-attr]
    refused = 0
    for byte in range(50, len(good) // 2, 997):
        shard.write_bytes(good[:byte] + bytes([good[byte] ^ 4]) + good[byte + 1 :])
        try:
            found = [s.signal.ids_N for s in kdstore.open(path).with_columns(["entries"])]  # type: ignore[union-attr]
        except CorruptShardError:
            refused += 1
            continue
        for one, other in zip(found, reference, strict=True):
            np.testing.assert_array_equal(one, other)
    assert refused > 0


def test_concatenations_mixtures_and_joins(dump: Dump) -> None:
    one, other = dump(), dump("other")
    both = kdstore.open([one, other])
    several: list[Any] = [
        both,
        kdstore.Mixture([kdstore.open(one), kdstore.open(other)], weights=[1, 1]),
        kdstore.Join(kdstore.open(one), {"other": kdstore.open(other)}),
    ]
    for data in several:
        for batch in data.loader(batch_size=20, columns=["entropy"]):
            assert set(batch.signal.scalars) == {"entropy"}
            assert not len(batch.signal.ids_N)
