"""``topk`` on columns that ranks share equals ``select`` on all of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from kdstore.errors import TeacherError
from kdstore.hashing import RowKeys
from kdstore.select import SelectionStats, parse_selection, select
from kdstore.select.sharded import Gathered, fits_ranks, gather_ranks, select_gathered

SCALARS = ("label_logprob", "label_rank", "entropy", "lse")


def told_by_ranks(logits, labels, *, per_rank, k, num_ids) -> list[Gathered]:
    """One thread a rank; the first ranks have ``per_rank`` columns, the last may have fewer."""
    shards = logits.split(per_rank, dim=1)
    barrier, told = Barrier(len(shards)), [None] * len(shards)

    def rank(index):
        def gather(mine):
            told[index] = mine
            barrier.wait(60)
            found = torch.stack(told)
            barrier.wait(60)
            return found

        return gather_ranks(
            shards[index],
            labels,
            first_id=index * per_rank,
            k=k,
            num_ids=num_ids,
            gather=gather,
        )

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(rank, range(len(shards))))


def both(logits, labels, *, per_rank, k, num_ids):
    """The signal and stats of ranks, and of one that has all columns."""
    keys = RowKeys(0, np.arange(len(logits), dtype=np.uint64), np.arange(len(logits)), 0)
    selection, stats = parse_selection(f"topk:k={k}"), (SelectionStats(), SelectionStats())
    all_told = told_by_ranks(logits, labels, per_rank=per_rank, k=k, num_ids=num_ids)
    for told in all_told[1:]:
        torch.testing.assert_close(told.parts_PCM, all_told[0].parts_PCM, equal_nan=True)
    found = select_gathered(
        all_told[0], selection=selection, keys=keys, scalars=SCALARS, stats=stats[0]
    )
    expected = select(
        logits,
        labels,
        selection=selection,
        keys=keys,
        scalars=SCALARS,
        num_ids=num_ids,
        stats=stats[1],
    )
    return found, expected, stats


def rows(kind: str, V: int) -> torch.Tensor:
    logits = torch.randn(40, V, generator=torch.Generator().manual_seed(V))
    if kind == "sharp":
        return logits * 200
    if kind == "ties":
        return (logits * 4).bfloat16()
    if kind == "holes":
        logits[::2, : V // 8] = -torch.inf
        logits[1::4, 3:] = -torch.inf
    return logits


@pytest.mark.parametrize("kind", ["smooth", "sharp", "ties", "holes"])
@pytest.mark.parametrize(
    ("V", "per_rank", "num_ids"),
    [(1000, 128, 1000), (997, 250, 700), (640, 160, 150), (77, 20, 70), (300, 300, 290)],
)
@pytest.mark.parametrize("k", [1, 50, 90])
def test_ranks_together_know_as_much_as_one(kind, V, per_rank, num_ids, k):
    """Uneven shards, some of padding alone, ties across them, k of more than a shard has."""
    logits = rows(kind, V)
    labels = torch.randint(0, V, (40,), generator=torch.Generator().manual_seed(1))
    found, expected, stats = both(logits, labels, per_rank=per_rank, k=k, num_ids=num_ids)
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.ids_N, expected.ids_N)
    for name in ("logprobs_N", "rest_S"):
        a, b = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(found.scalars["label_rank"], expected.scalars["label_rank"])
    for name in SCALARS:
        a, b = found.scalars[name], expected.scalars[name]
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)
    assert stats[0].num_positions == stats[1].num_positions == 40
    assert stats[0].padding_mass == pytest.approx(stats[1].padding_mass, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_distribution_is_refused_by_position(bad):
    logits = rows("smooth", 100)
    logits[7, 60] = bad
    with pytest.raises(TeacherError, match="position 7"):
        both(logits, torch.zeros(40, dtype=torch.int64), per_rank=50, k=5, num_ids=100)


@pytest.mark.parametrize(
    ("spec", "scalars", "audit_fraction", "fits"),
    [
        ("topk:k=5", SCALARS, 0.0, True),
        ("topk:k=5", SCALARS, 0.1, False),
        ("topk:k=5", ("lse_T2",), 0.0, False),
        ("topp:p=0.9,max_k=5", (), 0.0, False),
        ("pps:tau=0.1", (), 0.0, False),
    ],
)
def test_what_can_be_told_in_little(spec, scalars, audit_fraction, fits):
    assert fits_ranks(parse_selection(spec), scalars, audit_fraction=audit_fraction) is fits
