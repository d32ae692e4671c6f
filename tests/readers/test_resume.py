"""Resuming: any layout goes on exactly where any other stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kdstore.errors import StoreMismatchError, UsageError
from kdstore.readers.batches import BatchPlan
from kdstore.readers.mixture import Mixture
from kdstore.readers.sampler import BatchSampler
from tests.readers.planned import FakeSamples, content, epoch_of

RANKS = (1, 2, 3, 8)
OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 5},
    {"batch_tokens": 2000, "pack": True},
    {"batch_tokens": 4000, "pack": True, "max_length": 1000, "streams": 6},
]


def run(
    data: Any, options: dict[str, Any], world_size: int, state: Any, most: int = 10**9
) -> tuple[list[list[tuple[int, ...]]], Any]:
    """The real batches of the rest of an epoch in order, at most so many steps; and the state."""
    samplers = [
        BatchSampler(data, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        if state is not None:
            sampler.load_state_dict(json.loads(json.dumps(state)))
    ranks: list[Iterator[BatchPlan]] = [iter(sampler) for sampler in samplers]
    batches: list[list[tuple[int, ...]]] = []
    cursor = state
    for _ in range(most):
        step = [next(rank, None) for rank in ranks]
        plans = [plan for plan in step if plan is not None]
        if not plans:
            break
        assert len(plans) == world_size  # all ranks step equally often
        batches += [content(plan) for plan in plans if not plan.is_filler]
        cursor = plans[0].cursor
        assert all(plan.cursor == cursor for plan in plans)
    return batches, cursor


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("world_size", RANKS)
def test_any_number_of_ranks_gives_the_same_order(options: dict[str, Any], world_size: int) -> None:
    data = FakeSamples(24)
    one = [content(plan) for (plan,) in epoch_of(data, **options)]
    assert run(data, options, world_size, None)[0] == one


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("before", RANKS)
@pytest.mark.parametrize("after", RANKS)
def test_stopping_after_any_step_loses_and_repeats_nothing(
    options: dict[str, Any], before: int, after: int
) -> None:
    data = FakeSamples(12)
    one = [content(plan) for (plan,) in epoch_of(data, **options)]
    num_steps = -(-len(one) // before)
    for most in range(1, num_steps, max(1, num_steps // 12)):
        done, state = run(data, options, before, None, most)
        rest, _ = run(data, options, after, state)
        assert done + rest == one


def test_many_restarts_with_changing_layouts_give_the_epochs_of_one_run() -> None:
    data, options = FakeSamples(12), OPTIONS[1]
    sampler = BatchSampler(data, rank=0, world_size=1, **options)
    epochs = [[content(plan) for plan in sampler] for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    generator = np.random.default_rng(0)
    found: list[list[tuple[int, ...]]] = []
    state: Any = None
    while len(found) < sum(map(len, epochs)):
        world_size, most = int(generator.choice(RANKS)), int(generator.integers(1, 9))
        batches, state = run(data, options, world_size, state, most)
        found += batches
    assert found == [batch for epoch in epochs for batch in epoch]


def test_a_state_is_small_json() -> None:
    data = FakeSamples(64 * 40, rows=8, longest=40)
    sampler = BatchSampler(data, rank=0, world_size=1, batch_size=2)
    largest = 0
    for n, plan in enumerate(sampler):
        if n % 97 == 0:
            largest = max(largest, len(json.dumps(plan.cursor)))
        if n > 5000:
            break
    assert json.loads(json.dumps(sampler.state_dict())) == sampler.state_dict()
    assert plan.cursor["parts"][0][2].count("\n") == 0
    assert 300 < largest < 1000


def test_the_state_behind_the_last_step_is_the_next_epoch() -> None:
    data = FakeSamples(4)
    sampler = BatchSampler(data, rank=0, world_size=1, batch_size=5)
    *_, last = list(sampler)
    assert last.cursor == sampler.state_dict()
    assert (last.cursor["epoch"], last.cursor["batch"]) == (1, 0)
    second = [content(plan) for plan in sampler]
    again = BatchSampler(data, rank=0, world_size=1, batch_size=5)
    again.load_state_dict(last.cursor)
    assert [content(plan) for plan in again] == second


def test_an_iteration_that_was_left_goes_on() -> None:
    data = FakeSamples(4)
    whole = [content(plan) for (plan,) in epoch_of(data, batch_size=5)]
    sampler = BatchSampler(data, rank=0, world_size=1, batch_size=5)  # type: ignore[arg-type]
    found = [content(next(iter(sampler))) for _ in whole]
    assert found == whole


def test_a_state_of_other_options_or_data_is_refused() -> None:
    data = FakeSamples(4)
    state = BatchSampler(data, rank=0, world_size=1, batch_size=5).state_dict()
    with pytest.raises(UsageError, match=r"batch_size[\s\S]*batch_size=5[\s\S]*batch_size=6"):
        BatchSampler(data, rank=0, world_size=1, batch_size=6).load_state_dict(state)
    other = FakeSamples(4, seed=1)
    with pytest.raises(StoreMismatchError, match="other data"):
        BatchSampler(other, rank=0, world_size=1, batch_size=5).load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [
        None,
        {},
        {"version": 2},
        {"parts": []},
        {"parts": [[0, 0, "§"]]},
        {"parts": [[0, 0, "abc"]]},
        {"parts": [[0, -1, ""]]},
        {"epoch": "one"},
    ],
)
def test_a_damaged_state_is_refused(damage: Any) -> None:
    data = FakeSamples(4)
    sampler = BatchSampler(data, rank=0, world_size=1, batch_size=5)
    next(iter(sampler))
    state = {**sampler.state_dict(), **damage} if damage else damage
    with pytest.raises(UsageError, match="state"):
        list(run(data, {"batch_size": 5}, 1, state or {"version": None}))


def mixture(**shares: Any) -> Mixture:
    stores: list[Any] = [FakeSamples(6, seed=seed) for seed in range(3)]
    return Mixture(stores, **shares)


@pytest.mark.parametrize(
    "shares",
    [
        {"weights": [5, 3, 2]},
        {"repeat": [1, 0.5, 2.25]},
        {"choose": [100, 7, 333]},
        {"choose": [100, 0, 333]},
    ],
)
def test_mixtures_keep_their_shares_and_go_through_each_store(shares: dict[str, Any]) -> None:
    data = mixture(**shares)
    sampler = BatchSampler(data, rank=0, world_size=1, batch_size=4)
    counts = np.zeros(3)
    seen: list[list[int]] = [[], [], []]
    firsts = np.cumsum([0, *map(len, data.stores)])
    for epoch in range(1, 5):
        for plan in sampler:
            parts = np.searchsorted(firsts, plan.pieces[:, 0], side="right") - 1
            assert len(set(parts.tolist())) == 1
            counts[parts[0]] += len(plan)
            seen[parts[0]] += (plan.pieces[:, 0] - firsts[parts[0]]).tolist()
        wanted = epoch * np.array([part.samples_per_epoch for part in data.parts])
        assert (np.abs(counts - wanted) < 4).all()
    for part, store in zip(seen, data.stores, strict=True):
        passes = [part[n : n + len(store)] for n in range(0, len(part), len(store))]
        assert all(len(set(one)) == len(one) for one in passes)


def test_mixtures_resume_like_stores() -> None:
    options = {"batch_tokens": 3000, "pack": True}
    data = mixture(weights=[1, 2, 3])
    one, _ = run(data, options, 1, None)
    for most in (1, 5, 11):
        done, state = run(data, options, 2, None, most)
        assert len(json.dumps(state)) < 1000
        assert done + run(data, options, 3, state)[0] == one


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"weights": [1, 2]},
        {"weights": [1, 2, -1]},
        {"weights": [0, 0, 0]},
        {"weights": [1, 1, 1], "choose": [1, 1, 1]},
        {"repeat": [1, float("nan"), 1]},
    ],
)
def test_mixtures_that_cannot_work(shares: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="mixture"):
        mixture(**shares)


def test_a_mixture_of_two_vocabularies_is_refused() -> None:
    other = FakeSamples(2)
    other.vocab_digest = "w"
    with pytest.raises(StoreMismatchError, match="vocabularies"):
        Mixture([FakeSamples(2), other], weights=[1, 1])  # type: ignore[list-item]


def test_an_empty_store_has_no_batches_and_ends() -> None:
    sampler = BatchSampler(FakeSamples(0), rank=0, world_size=1, batch_size=2)  # type: ignore[arg-type]
    assert list(sampler) == []
