"""Batches: shifted rows, packing, masks from lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import kdstore
from kdstore.errors import UsageError
from kdstore.readers.cache import CACHED_ROW_GROUPS
from kdstore.sample import Sample
from kdstore.signal import SparseSignal

Dump = Callable[..., Path]


def sample_of(name: str, ids: list[int], runs: tuple[tuple[int, int], ...]) -> Sample:
    scored = sum(end - start for start, end in runs)
    signal = SparseSignal.from_arrays(
        "topk:k=1", np.arange(scored + 1), np.arange(scored), np.zeros(scored)
    )
    return Sample(name, np.array(ids, dtype=np.int32), runs=runs, signal=signal)


SAMPLES = [sample_of("a", [3, 4, 5, 6], ((1, 2), (3, 4))), sample_of("b", [7, 0, 0], ((1, 3),))]


def test_padded_rows_answer_the_token_before() -> None:
    batch = kdstore.Collator(pad_id=0)(SAMPLES)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6], [7, 0, 0, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.labels.tolist() == [[-100, 4, -100, 6], [-100, 0, 0, -100]]
    assert batch.logit_rows_S.tolist() == [0, 2, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.weights_S.tolist() == [1, 1, 1, 1]


def test_packed_rows_answer_the_token_before() -> None:
    batch = kdstore.Collator(pack=True)(SAMPLES)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.labels.tolist() == [[-100, 4, -100, 6, -100, 0, 0]]
    assert batch.logit_rows_S.tolist() == [0, 2, 4, 5]
    assert batch.attention_mask is None


def test_packed_samples_do_not_see_each_other(dump: Dump, teacher_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    samples = list(kdstore.open(dump()))[:5]
    rows = {}
    for pack in (False, True):
        batch = kdstore.Collator(pack=pack)(samples)
        with torch.no_grad():
            logits = model(**batch.model_inputs()).logits
        rows[pack] = logits.view(-1, logits.shape[-1])[batch.logit_rows_S]
    torch.testing.assert_close(rows[True], rows[False], atol=1e-4, rtol=1e-4)


def test_a_batch_without_signals_is_refused() -> None:
    bare = Sample("a", np.array([1, 2], dtype=np.int32), runs=((1, 2),))
    with pytest.raises(UsageError, match="'a'"):
        kdstore.Collator()([bare])
    with pytest.raises(UsageError):
        kdstore.Collator()([])


@pytest.mark.parametrize("pack", [True, False])
def test_loader_gives_every_sample_once_an_epoch_within_its_budget(dump: Dump, pack: bool) -> None:
    store = kdstore.open(dump())
    loader = store.loader(batch_tokens=150, pack=pack, seed=1, epochs=2)
    batches = list(loader)
    seen = [sample_id for batch in batches for sample_id in batch.sample_ids]
    assert sorted(seen[:60]) == sorted(seen[60:]) == sorted(f"row-{i}" for i in range(60))
    assert seen[:60] != seen[60:]
    assert max(batch.input_ids.numel() for batch in batches) <= 150
    again = store.loader(batch_tokens=150, pack=pack, seed=1, epochs=2)
    assert seen == [i for batch in again for i in batch.sample_ids]
    later = [i for batch in loader for i in batch.sample_ids]  # epochs 2 and 3
    assert sorted(later) == sorted(seen)
    assert later[:60] not in (seen[:60], seen[60:])


def test_shuffled_order_reads_each_row_group_once(
    dump: Dump, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdstore.readers.shard import ShardReader

    store = kdstore.open(dump(unit_tokens=100))
    assert [start for start, _ in store.row_groups()][:2] == [0, store.commits[0].shard.rows]
    assert len(store.row_groups()) > 2 * CACHED_ROW_GROUPS
    read: list[str] = []
    row_group = ShardReader.row_group
    monkeypatch.setattr(
        ShardReader,
        "row_group",
        lambda self, group: read.append(f"{self.where} {group}") or row_group(self, group),
    )
    assert len(list(store.loader(batch_size=1, seed=3))) == 60
    assert len(read) == len(set(read)) == len(store.row_groups())


def test_loader_needs_one_size(dump: Dump) -> None:
    store = kdstore.open(dump())
    for options in ({}, {"batch_tokens": 5, "batch_size": 5}):
        with pytest.raises(UsageError, match="batch_tokens"):
            store.loader(**options)
    sizes = [len(batch.sample_ids) for batch in store.loader(batch_size=25, shuffle=False)]
    assert sizes == [25, 25, 10]


def test_to_keeps_everything(dump: Dump) -> None:
    batch = next(iter(kdstore.open(dump()).loader(batch_size=3)))
    moved = batch.to("cpu")
    assert moved.sample_ids == batch.sample_ids
    torch.testing.assert_close(moved.signal.logprobs_N, batch.signal.logprobs_N)


def test_padding_of_a_packed_row_is_no_longer_than_its_samples() -> None:
    """A student with a context of 5 tokens takes rows of 16: padding restarts as samples do."""
    samples = [sample_of(f"s{length}", [1] * length, ((1, length),)) for length in (5, 3)]
    batch = kdstore.Collator(pack=True, max_length=16)(samples)
    assert batch.longest == 5
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 13, 16]
    starts = [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.position_ids.tolist() == [starts]
    flat = batch.model_inputs(varlen=True)
    assert flat["max_length_q"] == 5
    assert flat["cu_seq_lens_k"].tolist() == [0, 5, 8, 13, 16]
