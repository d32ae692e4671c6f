"""How many steps an epoch has, counted without reading; and steps in groups."""

from __future__ import annotations

import json
from typing import Any

import pytest

import kdstore
from kdstore.errors import UsageError
from kdstore.readers.batches import BatchConfig
from kdstore.readers.mixture import Mixture, parts_of
from kdstore.readers.sequence import BatchSequence, epochs_before
from tests.readers.planned import FakeSamples

OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 5},
    {"batch_size": 5, "min_tokens": 20, "max_tokens": 400},
    {"batch_tokens": 2000, "max_length": 300, "overlong": "split"},
    {"batch_tokens": 2000, "pack": True},
    {"batch_tokens": 4000, "pack": True, "max_length": 1000, "streams": 6},
]


def sequence_of(data: Any, options: dict[str, Any], state: Any = None) -> BatchSequence:
    return BatchSequence(parts_of(data), BatchConfig(**options), state)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["store", "mixture"])
def test_counts_are_those_of_the_plans(options: dict[str, Any], kind: str) -> None:
    """From the start, and from the middle of an epoch, over three epochs."""
    data: Any = FakeSamples(24)
    if kind == "mixture":
        data = Mixture([data, FakeSamples(7, seed=1)], weights=[3, 1])  # type: ignore[list-item]
    planned = sequence_of(data, options)
    epochs = [list(planned.steps(0, 1)) for _ in range(3)]
    counted = sequence_of(data, options)
    assert [counted.count() for _ in range(3)] == [len(epoch) for epoch in epochs]
    assert counted.state == planned.state
    middle = json.loads(json.dumps(epochs[1][4].cursor))
    assert sequence_of(data, options, middle).count() == len(epochs[1]) - 5


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("group", [1, 4])
def test_steps_come_in_groups(options: dict[str, Any], group: int) -> None:
    """Fillers end an epoch, on each rank equally many, with the state of its end."""
    data = FakeSamples(24)
    batches = sequence_of(data, options).count()
    ranks = []
    for rank in range(3):
        plans = list(sequence_of(data, options).steps(rank, 3, group=group))
        assert len(plans) == -(-batches // (3 * group)) * group
        ranks.append(plans)
    real = [plan for plans in ranks for plan in plans if not plan.is_filler]
    assert len(real) == batches
    assert all(plan.cursor["epoch"] == 1 for plan in (plans[-1] for plans in ranks))
    assert ranks[0][-1].cursor["batch"] == 0


def test_epochs_before_a_state() -> None:
    data = FakeSamples(24)
    options = OPTIONS[0]
    sequence = sequence_of(data, options)
    seen = 0
    assert epochs_before(parts_of(data), sequence.state) == 0  # type: ignore[arg-type]
    for epoch in range(2):
        plans = list(sequence.steps(0, 1))
        for plan in plans[:-1]:
            seen += len(plan)
            found = epochs_before(parts_of(data), plan.cursor)  # type: ignore[arg-type]
            assert found == pytest.approx(seen / len(data))
        seen = (epoch + 1) * len(data)
        assert epochs_before(parts_of(data), plans[-1].cursor) == epoch + 1  # type: ignore[arg-type]


def test_a_loader_counts_from_where_it_is(dump: Any) -> None:
    store = kdstore.open(dump())
    loader = store.loader(batch_size=7, rank=1, world_size=2, group=4)
    assert loader.count_steps(3) == [8, 8, 8]  # 9 batches, 5 of a rank
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    assert loader.count_steps(2) == [4, 8]
    assert [batch.is_filler for batch in batches] == [True] * 4
    assert not loader.is_empty
    assert store.loader(batch_size=7, min_tokens=10**6).is_empty
    with pytest.raises(UsageError, match="group of a loader cannot work"):
        store.loader(batch_size=2, group=0)
