"""Loaders on real stores: layouts, workers, packs, filters, frameworks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdstore
from kdstore.errors import UsageError
from kdstore.readers.collate import Batch
from kdstore.readers.dataset import BatchDataset, PositionFilter
from kdstore.readers.sampler import BatchSampler
from kdstore.readers.store import Store
from kdstore.sample import Sample, Span
from tests.conftest import run_dump

Dump = Callable[..., Path]
FORKS = "ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning"
FEW_CPUS = "ignore:This DataLoader will create:UserWarning"
TORCHDATA = "ignore:.set_vital. is deprecated:UserWarning"
PACKED: dict[str, Any] = {"batch_tokens": 256, "pack": True, "max_length": 128}
PADDED: dict[str, Any] = {"batch_size": 4}


def ids_of(batch: Batch) -> list[str]:
    return [] if batch.is_filler else batch.sample_ids


def run(
    store: Store, options: dict[str, Any], *, ranks: int, workers: int, state: Any, most: int
) -> tuple[list[list[str]], Any]:
    """Batches of all ranks in order, at most so many steps, and the state behind them."""
    of_ranks = []
    for rank in range(ranks):
        loader = store.loader(rank=rank, world_size=ranks, num_workers=workers, **options)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        some = []
        for batch in loader:
            some.append(ids_of(batch))
            if len(some) == most:
                break
        of_ranks.append((some, loader.state_dict()))
    steps = zip(*(some for some, _ in of_ranks), strict=True)
    assert all(state == of_ranks[0][1] for _, state in of_ranks)
    return [batch for step in steps for batch in step if batch], of_ranks[0][1]


@pytest.fixture(scope="module")
def many_units(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, data_file: Path
) -> Path:
    out = tmp_path_factory.mktemp("units") / "store"
    run_dump("--teacher", teacher_dir, "--data", data_file, "--out", out, "--unit-tokens", 150)
    return out


@pytest.mark.filterwarnings(FORKS, FEW_CPUS)
@pytest.mark.parametrize("options", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_run_is_stopped_and_goes_on_in_another_layout(
    many_units: Path, options: dict[str, Any], ranks: int, workers: int
) -> None:
    store = kdstore.open(many_units)
    options = {**options, "epochs": 2}
    one = [ids_of(batch) for batch in store.loader(rank=0, world_size=1, **options)]
    assert sorted(chain(*one)) == sorted([f"row-{i}" for i in range(60)] * 2)
    most = 2 if ranks == 1 else 1
    others = {1: (8, 2), 2: (3, 0), 3: (2, 4), 8: (1, 0)}
    done, state = run(store, options, ranks=ranks, workers=workers, state=None, most=most)
    after, workers_after = others[ranks]
    rest, _ = run(store, options, ranks=after, workers=workers_after, state=state, most=10**6)
    assert done + rest == one


@pytest.mark.parametrize("options", [PADDED, PACKED], ids=["padded", "packed"])
def test_it_is_exact_after_every_step(dump: Dump, options: dict[str, Any]) -> None:
    store = kdstore.open(dump())
    whole = list(store.loader(seed=2, **options))
    for n, batch in enumerate(whole):
        loader = store.loader(seed=2, **options)
        loader.load_state_dict(batch.cursor)
        rest = list(loader) if n + 1 < len(whole) else []
        assert [b.sample_ids for b in rest] == [b.sample_ids for b in whole[n + 1 :]]
        for one, other in zip(rest, whole[n + 1 :], strict=True):
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.signal.logprobs_N, other.signal.logprobs_N)


def test_the_state_is_of_what_was_given_out_not_of_what_was_read_ahead(dump: Dump) -> None:
    loader = kdstore.open(dump()).loader(batch_size=4, num_workers=2)
    batches = iter(loader)
    first = next(batches)
    assert loader.state_dict() == first.cursor
    assert first.cursor["batch"] == 1
    second = next(batches)
    loader.load_state_dict(first.cursor)
    assert next(iter(loader)).sample_ids == second.sample_ids


def test_epochs_follow_each_other(dump: Dump) -> None:
    store = kdstore.open(dump())
    loader = store.loader(batch_size=7, epochs=1)
    by_epoch = [[b.sample_ids for b in loader] for _ in range(3)]
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
    assert [b.sample_ids for b in store.loader(batch_size=7, epochs=3)] == list(chain(*by_epoch))
    resumed = store.loader(batch_size=7, epochs=3)
    for batch in store.loader(batch_size=7, epochs=3):
        if batch.cursor["epoch"] == 1 and batch.cursor["batch"] == 2:
            resumed.load_state_dict(batch.cursor)
    assert [b.sample_ids for b in resumed] == by_epoch[1][2:] + by_epoch[2]


def test_ranks_without_a_batch_get_one_that_teaches_nothing(dump: Dump) -> None:
    store = kdstore.open(dump())
    ranks = [list(store.loader(batch_size=25, rank=r, world_size=2)) for r in range(2)]
    assert [len(rank) for rank in ranks] == [2, 2]
    filler = ranks[1][1]
    assert filler.is_filler
    assert not any(b.is_filler for b in [*ranks[0], ranks[1][0]])
    assert len(filler.signal) == len(filler.logit_rows_S) == len(filler.weights_S) == 0
    assert (filler.labels == -100).all()
    logits = torch.randn(*filler.input_ids.shape, store.vocab_size, requires_grad=True)
    for loss in (kdstore.losses.forward_kl(logits, filler), kdstore.losses.ce(logits, filler)):
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert not logits.grad.any()


def test_packs_are_rows_that_a_model_reads_as_single_samples(dump: Dump, teacher_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    store = kdstore.open(dump())
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    batch = next(iter(store.loader(**PACKED)))
    assert batch.input_ids.shape == (2, 128)
    lengths = batch.cu_seqlens.diff().tolist()
    assert (sum(lengths), batch.cu_seqlens.dtype) == (256, torch.int32)
    by_name = {sample.sample_id: sample for sample in store}
    samples = [by_name[name] for name in batch.sample_ids]
    assert {s.num_tokens for s in samples} <= set(lengths)
    alone = kdstore.Collator()(samples)
    with torch.no_grad():
        packed, padded = (model(**b.model_inputs()).logits for b in (batch, alone))
    rows = [
        logits.view(-1, logits.shape[-1])[b.logit_rows_S]
        for logits, b in ((packed, batch), (padded, alone))
    ]
    torch.testing.assert_close(rows[0], rows[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(batch.signal.ids_N, alone.signal.ids_N)
    starts = batch.cu_seqlens[:-1].long()
    assert (batch.position_ids.view(-1)[starts] == 0).all()
    assert (batch.position_ids.view(-1) == 0).sum() == len(starts)


def test_split_samples_keep_every_position_once(dump: Dump) -> None:
    store = kdstore.open(dump())
    longest = max(sample.num_tokens for sample in store)
    loader = store.loader(batch_tokens=64, max_length=max(16, longest // 3), overlong="split")
    found: dict[str, int] = {}
    entropy = 0.0
    for batch in loader:
        assert batch.input_ids.shape[1] <= max(16, longest // 3)
        entropy += float(batch.signal.scalars["entropy"].sum())
        assert torch.equal(
            batch.labels.view(-1)[batch.logit_rows_S + 1], batch.labels[batch.labels >= 0]
        )
        for name in batch.sample_ids:
            found[name] = found.get(name, 0) + 1
    assert len(found) == 60
    assert max(found.values()) == 4  # a piece begins with the last token of the one before
    expected = sum(float(s.signal.scalars["entropy"].sum()) for s in store)  # type: ignore[union-attr]
    assert entropy == pytest.approx(expected, rel=1e-5)


def test_a_part_of_a_sample_predicts_what_the_whole_does(dump: Dump) -> None:
    sample = next(s for s in kdstore.open(dump()) if s.num_tokens > 20)
    sample = replace(sample, spans=(Span(2, 9, "user", False), Span(9, 20, "assistant", True)))
    part = sample.part(5, 12)
    assert part.input_ids_T.tolist() == sample.input_ids_T[5:12].tolist()
    assert part.runs == ((1, 7),)
    assert [(s.start, s.end, s.kind) for s in part.spans] == [(0, 4, "user"), (4, 7, "assistant")]
    assert part.signal is not None
    assert sample.signal is not None
    np.testing.assert_array_equal(part.signal.ids_N, sample.signal[5:11].ids_N)


def test_positions_are_filtered_by_kind_and_scalar() -> None:
    signal = kdstore.SparseSignal.from_arrays(
        "topk:k=1",
        np.arange(6),
        np.arange(5),
        np.zeros(5),
        scalars={"entropy": [0, 1, 2, 3, 4], "label_logprob": [-4, -3, -2, -1, 0]},
    )
    spans = (Span(0, 3, "user", False), Span(3, 5, "assistant", True), Span(5, 7, "tool", True))
    ids = np.arange(7, dtype=np.int32)
    sample = Sample("a", ids, spans=spans, runs=((1, 3), (4, 7)), signal=signal)

    def positions(**options: Any) -> list[int]:
        kept = PositionFilter(**options)(sample)
        assert kept.signal is not None
        assert kept.signal.ids_N.tolist() == [
            [1, 2, 4, 5, 6].index(p) for p in kept.positions_S.tolist()
        ]
        return kept.positions_S.tolist()

    assert positions() == [1, 2, 4, 5, 6]
    assert positions(kinds=("assistant",)) == [4]
    assert positions(kinds=("user", "tool")) == [1, 2, 5, 6]
    assert positions(entropy=(1, 3)) == [2, 4, 5]
    assert positions(label_logprob=(-1, 0), kinds=("tool",)) == [5, 6]
    assert positions(entropy=(9, 10)) == []
    bare = replace(sample, signal=replace(signal, scalars={}))
    with pytest.raises(UsageError, match="entropy"):
        PositionFilter(entropy=(0, 1))(bare)


def test_a_loader_keeps_the_wanted_positions(dump: Dump) -> None:
    store = kdstore.open(dump())
    keep = PositionFilter(entropy=(0.5, 2.0))
    batches = list(store.loader(batch_size=8, keep=keep))
    entropies = torch.cat([b.signal.scalars["entropy"] for b in batches])
    every = np.concatenate([s.signal.scalars["entropy"] for s in store])  # type: ignore[union-attr]
    assert len(entropies) == ((every >= 0.5) & (every <= 2.0)).sum() > 0
    assert sum(len(b.sample_ids) for b in batches) == 60


def samples_per_length(store: Store) -> int:
    return sum(10 <= sample.num_tokens <= 30 for sample in store)


def test_a_loader_takes_samples_of_some_lengths(dump: Dump) -> None:
    store = kdstore.open(dump())
    seen = [i for b in store.loader(batch_size=8, min_tokens=10, max_tokens=30) for i in ids_of(b)]
    assert len(seen) == samples_per_length(store) > 0


@pytest.mark.filterwarnings(FORKS, FEW_CPUS)
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_what_one_process_gives(dump: Dump, context: str) -> None:
    store = kdstore.open(dump())
    store[0]
    options: dict[str, Any] = {**PACKED, "epochs": 2}
    loader = store.loader(num_workers=2, multiprocessing_context=context, **options)
    for one, other in zip(store.loader(**options), loader, strict=True):
        assert one.sample_ids == other.sample_ids
        assert one.cursor == other.cursor
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.signal.logprobs_N, other.signal.logprobs_N)


@pytest.mark.filterwarnings(FORKS, FEW_CPUS)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_parts_work_in_a_data_loader_of_ones_own(dump: Dump, workers: int) -> None:
    store = kdstore.open(dump())
    loader = torch.utils.data.DataLoader(
        BatchDataset(store),
        batch_sampler=BatchSampler(store, batch_size=7, seed=4),  # type: ignore[arg-type]
        collate_fn=kdstore.Collator(),
        num_workers=workers,
    )
    epochs = [[b.sample_ids for b in loader] for _ in range(2)]
    assert list(chain(*epochs)) == [
        b.sample_ids for b in store.loader(batch_size=7, seed=4, epochs=2)
    ]


@pytest.mark.filterwarnings(FORKS, FEW_CPUS, TORCHDATA)
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_resumes_it(dump: Dump, workers: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    store = kdstore.open(dump())

    def make() -> Any:
        return StatefulDataLoader(
            BatchDataset(store),
            batch_sampler=BatchSampler(store, batch_size=7, seed=4),
            collate_fn=kdstore.Collator(),
            num_workers=workers,
        )

    whole = [b.sample_ids for b in make()]
    for stop in (1, 4, 8):
        loader, seen = make(), []
        for batch in loader:
            seen.append(batch.sample_ids)
            if len(seen) == stop:
                state = loader.state_dict()
                break
        again = make()
        again.load_state_dict(state)
        assert seen + [b.sample_ids for b in again] == whole


def test_accelerate_prepares_it(dump: Dump) -> None:
    from accelerate import Accelerator

    store = kdstore.open(dump())
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(
        torch.utils.data.DataLoader(
            BatchDataset(store),
            batch_sampler=BatchSampler(store, batch_size=7, seed=4),  # type: ignore[arg-type]
            collate_fn=kdstore.Collator(),
        )
    )
    epochs = [[b.sample_ids for b in loader] for _ in range(2)]
    assert list(chain(*epochs)) == [
        b.sample_ids for b in store.loader(batch_size=7, seed=4, epochs=2)
    ]


def test_rank_and_world_size_come_from_the_environment(
    dump: Dump, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = kdstore.open(dump())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    loader = store.loader(batch_size=7)
    assert (loader.rank, loader.world_size) == (1, 3)
    named = store.loader(batch_size=7, rank=0, world_size=1)
    assert (named.rank, named.world_size) == (0, 1)
    for options in ({"rank": 1}, {"rank": 3, "world_size": 3}):
        with pytest.raises(UsageError, match="rank"):
            store.loader(batch_size=7, **options)
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(UsageError, match="RANK"):
        store.loader(batch_size=7)


def test_draws_alternate_or_stay(dump: Dump) -> None:
    path = dump()
    dump(overlay="d1", draw=1)
    store = kdstore.open(path)

    def entries(**options: Any) -> list[int]:
        loader = store.loader(batch_size=60, shuffle=False, epochs=2, **options)
        return [batch.signal.ids_N.sum().item() for batch in loader]  # type: ignore[misc]

    first, second = entries()
    assert first != second
    assert entries(draw=0) == [first, first]
    assert entries(draw=1) == [second, second]


def test_unknown_options_and_no_epochs_are_refused(dump: Dump) -> None:
    store = kdstore.open(dump())
    with pytest.raises(UsageError, match="epochs"):
        store.loader(batch_size=2, epochs=0)
    with pytest.raises(TypeError, match="batchsize"):
        store.loader(batchsize=2)
