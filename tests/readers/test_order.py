"""Order and packing: every sample once, a pure function, few row groups at a time, full packs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdstore.errors import UsageError
from kdstore.readers.batches import BatchConfig
from kdstore.readers.packing import Piece, best_fit
from kdstore.readers.planner import make_order
from tests.readers.planned import FakeSamples, content, epoch_of

OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 7},
    {"batch_tokens": 2000},
    {"batch_tokens": 2000, "pack": True},
    {"batch_tokens": 4000, "pack": True, "max_length": 1000},
    {"batch_size": 3, "pack": True, "max_length": 1000},
]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_an_epoch_has_every_sample_once_within_the_budget(
    options: dict[str, Any], shuffle: bool
) -> None:
    data = FakeSamples(40)
    steps = epoch_of(data, shuffle=shuffle, **options)
    pieces = [piece for (plan,) in steps for piece in content(plan)]
    assert sorted(pieces) == [(i, 0, n) for i, n in enumerate(data.lengths.tolist())]
    for (plan,) in steps:
        lengths = plan.pieces[:, 2] - plan.pieces[:, 1]
        ends = np.cumsum(plan.packs)
        packed = [int(part.sum()) for part in np.split(lengths, ends[:-1])]
        if options.get("pack"):
            assert max(packed) <= options.get("max_length", 2000)
            rows = options.get("batch_size", options.get("batch_tokens", 0) // max(packed))
            assert len(plan.packs) <= max(rows, 1)
        elif "batch_size" in options:
            assert len(plan) <= 7
        else:
            assert int(lengths.max()) * len(plan) <= 2000


def test_without_shuffling_samples_come_as_they_lie() -> None:
    data = FakeSamples(9)
    steps = epoch_of(data, shuffle=False, batch_size=4)
    assert [i for (plan,) in steps for i, _, _ in content(plan)] == list(range(len(data)))


def test_the_order_is_of_seed_and_epoch() -> None:
    data = FakeSamples(40)

    def order(**options: Any) -> list[list[tuple[int, ...]]]:
        return [content(plan) for (plan,) in epoch_of(data, batch_size=5, **options)]

    assert order(seed=1) == order(seed=1)
    assert order(seed=1) != order(seed=2)
    config = BatchConfig(batch_size=5, seed=1)
    first, second = (
        next(make_order(data, config, epoch=epoch).windows(0, 0)).indices.tolist()  # type: ignore[arg-type]
        for epoch in (0, 1)
    )
    assert sorted(first) != sorted(second)


def test_the_order_of_today_is_that_of_tomorrow() -> None:
    """A state that was saved holds for later versions only if they give the same order."""
    data = FakeSamples(8, rows=12)
    steps = epoch_of(data, batch_tokens=3000, pack=True, seed=5)
    found = [[i for i, _, _ in content(plan)] for (plan,) in steps[:2]]
    assert found == EXPECTED


EXPECTED = [
    [34, 41, 35, 8, 36, 38, 33, 42, 43, 31, 28, 44, 37, 32, 30, 29, 39, 40, 55, 56, 10, 9],
    [1, 6, 0, 17, 18],
]


def test_a_stream_reads_few_row_groups_at_a_time() -> None:
    data = FakeSamples(64, rows=400, longest=30)
    config = BatchConfig(batch_size=2, streams=4, window=3)
    order = make_order(data, config, epoch=0)  # type: ignore[arg-type]
    assert order.streams == 4
    ends = np.cumsum(np.concatenate([o.group_rows for o in data._outlines]))
    seen: list[int] = []
    shards: list[set[int]] = []
    for stream in range(4):
        shards.append(set())
        for cell in range(order.num_cells(stream)):
            for window in order.windows(stream, cell):
                groups = np.unique(np.searchsorted(ends, window.indices, side="right"))
                assert len(groups) <= 3
                seen += groups.tolist()
                shards[-1] |= set(np.searchsorted(data.first_rows, window.indices, "right"))
    assert sorted(seen) == list(range(len(ends)))  # each row group in one window
    assert sum(map(len, shards)) == 64  # each shard in one stream


def test_ranks_that_divide_the_streams_open_their_shards_only_to_read() -> None:
    data = FakeSamples(64, rows=400, longest=30)
    options: dict[str, Any] = {"batch_size": 2, "streams": 4}
    read: list[set[int]] = []
    for rank in range(4):
        steps = epoch_of(data, world_size=4, **options)
        # Once the shortest stream has ended the others take its turns.
        indices = np.array([i for step in steps[: len(steps) // 2] for i in step[rank]])[:, 0]
        read.append(set(np.searchsorted(data.first_rows, indices, side="right").tolist()))
    assert sum(map(len, read)) == len(set().union(*read))


@pytest.mark.parametrize("max_length", [None, 4096])
def test_packs_of_mixed_lengths_are_full(max_length: int | None) -> None:
    data = FakeSamples(40, rows=2000, longest=4000)
    steps = epoch_of(data, batch_tokens=65536, pack=True, max_length=max_length)
    width = max_length or 65536
    packs = sum(len(plan.packs) for (plan,) in steps)
    assert int(data.lengths.sum()) / (packs * width) > 0.97


def test_best_fit() -> None:
    pieces = [Piece(i, 0, length) for i, length in enumerate([3, 6, 5, 4, 2, 9, 1])]
    packs = best_fit(pieces, capacity=10, begun=[Piece(99, 0, 7)])
    # 9 opens a pack; 6 another; 5 a third; 4 fits 6 best; 3 fits 7 best; 2 goes to 5, 1 to 9
    assert [[piece.length for piece in pack] for pack in packs] == [[7, 3], [6, 4], [5, 2], [9, 1]]
    assert best_fit([], capacity=10, begun=[]) == []
    assert best_fit([Piece(0, 0, 20)], capacity=10, begun=[]) == [[Piece(0, 0, 20)]]


@pytest.mark.parametrize(("overlong", "kept"), [("skip", 0), ("truncate", 1), ("split", 3)])
def test_overlong_samples(overlong: str, kept: int) -> None:
    data = FakeSamples(1)
    data._outlines[0].lengths[:] = 9
    data._outlines[0].lengths[0] = 31
    options = {"batch_tokens": 100, "max_length": 11, "shuffle": False, "overlong": overlong}
    pieces = [piece for (plan,) in epoch_of(data, **options) for piece in content(plan)]
    assert pieces[:kept] == [(0, 0, 11), (0, 10, 21), (0, 20, 31)][:kept]
    assert pieces[kept] == (1, 0, 9)


def test_an_overlong_sample_is_an_error_by_default() -> None:
    data = FakeSamples(3)
    with pytest.raises(UsageError, match='overlong="skip"'):
        epoch_of(data, batch_tokens=500, max_length=100)


def test_lengths_may_be_limited() -> None:
    data = FakeSamples(10)
    steps = epoch_of(data, batch_size=5, min_tokens=20, max_tokens=200)
    found = sorted(i for (plan,) in steps for i, _, _ in content(plan))
    lengths = data.lengths
    assert found == np.flatnonzero((lengths >= 20) & (lengths <= 200)).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_tokens": 5, "batch_size": 5},
        {"batch_size": 0},
        {"batch_tokens": 100, "max_length": 200},
        {"batch_tokens": 100, "max_length": 1},
        {"batch_size": 4, "pack": True},
        {"batch_size": 4, "streams": 65},
        {"batch_size": 4, "window": 0},
        {"batch_size": 4, "overlong": "drop"},
    ],
)
def test_options_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        BatchConfig(**options)
