"""The audit's signal: the distributions that the selection saw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdstore.audit import audited_rows
from kdstore.select import SelectionStats, parse_selection, select, select_with_audit
from kdstore.select.driver import CPU_CHUNK_ELEMENTS
from tests.select.dense import keys_for, softmax

V = 300


def logits(count: int, vocab_size: int = V) -> torch.Tensor:
    return 3 * torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_audited_positions_have_the_whole_distribution(dtype: torch.dtype) -> None:
    rows, keys = logits(40).to(dtype), keys_for(40)
    options = {"selection": parse_selection("pps:tau=0.06"), "keys": keys}
    labels = torch.arange(40)
    signal, audit = select_with_audit(rows, labels, audit_fraction=0.3, **options)  # type: ignore[arg-type]
    audited = audited_rows(keys, fraction=0.3)
    assert audit.selection == "full"
    assert audit.scalars == {}
    assert len(audit) == len(audited) == 11
    np.testing.assert_allclose(audit.to_dense(V), softmax(rows)[audited], atol=1e-7)
    alone = select(rows, labels, **options)  # type: ignore[arg-type]
    for name in ("indptr", "ids_N", "logprobs_N", "rest_S"):
        np.testing.assert_array_equal(getattr(signal, name), getattr(alone, name))
    assert list(signal.scalars) == ["label_logprob", "label_rank", "entropy"]


def test_padding_is_left_out_of_both_and_counted_once() -> None:
    rows, stats = logits(20), SelectionStats()
    _, audit = select_with_audit(
        rows,
        torch.zeros(20, dtype=torch.long),
        selection=parse_selection("topk:k=3"),
        keys=keys_for(20),
        audit_fraction=1.0,
        num_ids=250,
        stats=stats,
    )
    assert (len(audit), int(audit.ids_N.max()), stats.num_positions) == (20, 249, 20)
    np.testing.assert_allclose(audit.to_dense(250), softmax(rows[:, :250]), atol=1e-7)


def test_the_audit_does_not_depend_on_who_shares_a_chunk() -> None:
    rows = logits(9, CPU_CHUNK_ELEMENTS // 2)  # two rows a chunk
    keys = keys_for(9)
    options = {"selection": parse_selection("topk:k=2"), "audit_fraction": 0.5}
    labels = torch.zeros(9, dtype=torch.long)
    _, whole = select_with_audit(rows, labels, keys=keys, **options)  # type: ignore[arg-type]
    parts = [
        select_with_audit(rows[i : i + 3], labels[i : i + 3], keys=keys[i : i + 3], **options)[1]  # type: ignore[arg-type]
        for i in (0, 3, 6)
    ]
    assert len(whole) == sum(map(len, parts)) > 2
    np.testing.assert_array_equal(whole.logprobs_N, np.concatenate([p.logprobs_N for p in parts]))


def test_without_a_fraction_there_is_no_audit() -> None:
    _, audit = select_with_audit(
        logits(5),
        torch.zeros(5, dtype=torch.long),
        selection=parse_selection("topk:k=2"),
        keys=keys_for(5),
        audit_fraction=0.0,
    )
    assert len(audit) == 0
