"""Several stores opened as one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

import kdstore
from kdstore.errors import StoreMismatchError, UsageError
from kdstore.readers.store import Store
from kdstore.writers.overlay import add_scalar
from tests.conftest import make_texts, write_jsonl
from tests.golden.arrays import GOLDEN
from tests.hostile import copy_store, edit_header
from tests.writers.test_dump import assert_same

Dump = Callable[..., Path]


@pytest.fixture
def urls(dump: Dump, tmp_path: Path) -> list[Path]:
    """Two stores of one teacher: 60 samples, and 13 others of which two have known ids."""
    texts = make_texts(13, seed=1)
    rows = [
        {"id": f"row-{50 + i}" if i < 2 else f"new-{i}", "text": t} for i, t in enumerate(texts)
    ]
    return [dump("one"), dump("two", data=write_jsonl(tmp_path / "new.jsonl", rows), seed=3)]


def test_samples_of_all_stores_come_one_after_the_other(urls: list[Path]) -> None:
    both, (one, two) = kdstore.open(urls), map(kdstore.open, urls)
    assert isinstance(both, kdstore.Concatenation)
    assert (len(both), both.num_shards) == (73, one.num_shards + two.num_shards)
    assert both.vocab_size == one.vocab_size == 384
    for sample, want in zip(both, [*one, *two], strict=True):
        assert_same(sample, want)
    wanted = [72, 0, -73, 59, 60, -1, 0]
    places = [(two, 12), (one, 0), (one, 0), (one, 59), (two, 0), (two, 12), (one, 0)]
    for sample, (store, index) in zip(both.__getitems__(wanted), places, strict=True):
        assert_same(sample, store[index])
    for index in (73, -74):
        with pytest.raises(IndexError, match=str(index)):
            both[index]
    assert_same(kdstore.open(tuple(map(str, urls)))[60], two[0])
    assert both.token_table().fingerprint() == one.token_table().fingerprint()
    both.close()
    assert_same(both[60], two[0])


def test_a_sample_id_that_comes_twice_is_found_in_the_first_store(urls: list[Path]) -> None:
    both = kdstore.open(urls)
    assert both.find("row-50") == 50
    assert both[60].sample_id == "row-50"
    assert both.find("new-12") == 72
    with pytest.raises(KeyError, match="row-60"):
        both.find("row-60")


def test_shards_of_all_stores(urls: list[Path]) -> None:
    both, stores = kdstore.open(urls), list(map(kdstore.open, urls))
    assert both.shard_rows.tolist() == [n for s in stores for n in s.shard_rows.tolist()]
    assert both.shard_tokens.tolist() == [n for s in stores for n in s.shard_tokens.tolist()]
    assert both.first_rows.tolist() == np.cumsum([0, *both.shard_rows]).tolist()
    assert both.shard_rows.dtype == both.shard_tokens.dtype == both.first_rows.dtype == np.int64
    lengths = [both.outline(shard).lengths.tolist() for shard in range(both.num_shards)]
    assert list(chain(*lengths)) == [sample.num_tokens for sample in both]
    assert both.outline(-1).lengths.tolist() == lengths[-1]
    groups = both.row_groups()
    assert [end for _, end in groups][:-1] == [start for start, _ in groups][1:]
    assert (groups[0][0], groups[-1][1]) == (0, 73)


def test_a_fingerprint_tells_stores_and_their_order(urls: list[Path]) -> None:
    both = kdstore.open(urls)
    assert both.fingerprint == pickle.loads(pickle.dumps(both)).fingerprint
    others = [kdstore.open(urls[::-1]), *map(kdstore.open, urls), kdstore.open(urls[:1])]
    assert both.fingerprint not in {other.fingerprint for other in others}
    assert len(both.fingerprint) == 16


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_plain_torch_dataloader(urls: list[Path], start: str) -> None:
    both = kdstore.open(urls)
    want = [sample.sample_id for sample in both]
    loader = torch.utils.data.DataLoader(
        both,  # type: ignore[arg-type]
        batch_size=7,
        collate_fn=kdstore.Collator(),
        num_workers=2,
        multiprocessing_context=start,
    )
    assert [name for batch in loader for name in batch.sample_ids] == want


def test_a_loader_reads_every_sample_once(urls: list[Path]) -> None:
    both = kdstore.open(urls)
    batches = list(both.loader(batch_tokens=300, pack=True, seed=4))
    seen = [name for batch in batches for name in batch.sample_ids]
    assert sorted(seen) == sorted(sample.sample_id for sample in both)
    assert sum(len(batch.signal) for batch in batches) == sum(s.num_scored for s in both)


def test_a_refresh_looks_at_every_store(dump: Dump) -> None:
    urls = [dump("one", unit="1/2"), dump("two", unit="0/2", seed=3)]
    both = kdstore.open(urls)
    before, seen = len(both), both.fingerprint
    second = both[int(both.first_rows[both.stores[0].num_shards])]
    dump("one", unit="0/2")
    assert (len(both), both.fingerprint, both.is_complete) == (before, seen, False)
    assert both.refresh() == len(both) - before == 60 - before + len(both.stores[1])
    assert both.fingerprint != seen
    assert_same(both[60], second)
    dump("two", unit="1/2", seed=3)
    assert (both.refresh() > 0, both.refresh(), len(both), both.is_complete) == (True, 0, 120, True)
    assert both[-1].sample_id == both[59].sample_id == "row-59"


def test_draws_that_every_store_has(dump: Dump) -> None:
    one, two = dump("one"), dump("two", seed=3)
    for name, draws in (("one", (1, 2)), ("two", (1,))):
        for draw in draws:
            dump(name, overlay=f"draw{draw}", draw=draw, seed=3 if name == "two" else 0)
    both = kdstore.open([one, two])
    assert both.num_draws == 2
    assert_same(both[61, 1], kdstore.open(two)[1, 1])
    with pytest.raises(UsageError, match="no draw 2"):
        both[61, 2]


def test_another_signal_of_all_stores(dump: Dump) -> None:
    urls = [dump(name, audit_fraction=0.5, seed=n) for n, name in enumerate(("one", "two"))]
    audits = kdstore.open(urls).with_signal("audit")
    assert_same(audits[70], kdstore.open(urls[1], signal="audit")[10])
    assert_same(kdstore.open(urls, signal="audit")[70], audits[70])


def test_scalars_of_overlays_must_be_in_all(urls: list[Path]) -> None:
    add_scalar(urls[0], "reward", lambda sample: np.ones(sample.num_scored, np.float32))
    with pytest.raises(StoreMismatchError, match=r"signals\.main\.scalars differs(.|\n)*overlays="):
        kdstore.open(urls)
    assert len(kdstore.open(urls, overlays=())) == 73
    add_scalar(urls[1], "reward", lambda sample: np.zeros(sample.num_scored, np.float32))
    signal = kdstore.open(urls)[60].signal
    assert signal is not None
    assert set(signal.scalars["reward"].tolist()) == {0.0}


CHANGES = [
    ("vocab_digest", {"vocab_digest": "0" * 64}),
    ("vocab_size", {"vocab_size": 50_258}),
    ("signals.main.selection", {"selection": "pps:tau=0.5"}),
    ("signals.main.scalars", {"scalars": []}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_stores_whose_signals_cannot_be_batched(
    tmp_path: Path, name: str, change: dict[str, object]
) -> None:
    one = GOLDEN / "pps-50257"
    same, other = (copy_store("pps-50257", tmp_path / part) for part in ("same", "other"))
    target = (lambda i: i["signals"]["main"]) if name.startswith("signals") else (lambda i: i)
    edit_header(other, lambda content: target(content["identity"]).update(change))
    with pytest.raises(StoreMismatchError, match=f"{name} differs") as caught:
        kdstore.open([one, same, other], overlays=())
    assert f"{one} and {other}" in str(caught.value)
    assert len(kdstore.open([one, same])) == 2 * len(kdstore.open(one))


def test_codecs_and_sources_may_differ(tmp_path: Path) -> None:
    one, other = GOLDEN / "pps-50257", copy_store("pps-50257", tmp_path / "other")
    edit_header(other, lambda content: content["identity"].update(source="elsewhere"))
    assert len(kdstore.open([one, other], overlays=())) == 2 * len(kdstore.open(one))


def test_no_stores() -> None:
    with pytest.raises(UsageError, match="no stores"):
        kdstore.open([])


def test_one_store_is_no_concatenation() -> None:
    assert isinstance(kdstore.open(GOLDEN / "pps-50257"), Store)
    assert isinstance(kdstore.open([GOLDEN / "pps-50257"]), kdstore.Concatenation)
