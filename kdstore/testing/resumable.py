"""Is a loader resumable? Stop it, go on with another, compare with an undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any

Batches = list[tuple[Any, ...]]


def assert_resumable(
    make_loader: Callable[..., Any],
    *,
    world_sizes: Sequence[int] = (1,),
    max_steps: int | None = None,
    max_stops: int = 20,
) -> None:
    """AssertionError unless a loader goes on from every step as if it had never stopped.

    ``make_loader(rank=…, world_size=…)`` gives a new loader, whose ``state_dict()`` goes through
    JSON. It is stopped after at most ``max_stops`` of its first ``max_steps`` steps, evenly spread,
    with each number of ranks, and goes on with each: all ranks together must give the batches of an
    uninterrupted rank, none twice, none missing, in order. Batches are compared by sample ids and
    token ids; those that only keep ranks in step do not count.

    >>> from kdstore.testing import assert_resumable
    >>> import kdstore
    >>> def make_loader(rank, world_size):
    ...     store = kdstore.open("STORE")
    ...     return store.loader(batch_size=8, rank=rank, world_size=world_size)
    >>> assert_resumable(make_loader, world_sizes=(1, 2, 3))  # doctest: +SKIP
    """
    whole, _ = _run(make_loader, 1, None, max_steps)
    assert whole, "the loader gives no batch, so nothing was tested"
    for before in world_sizes:
        steps = -(-len(whole) // before)
        for stop in range(1, steps, max(1, steps // max_stops)):
            done, state = _run(make_loader, before, None, stop)
            for after in world_sizes:
                left = -(-(len(whole) - len(done)) // after)
                rest, _ = _run(make_loader, after, state, left)
                _compare((done + rest)[: len(whole)], whole, before=before, after=after, stop=stop)


def _run(
    make_loader: Callable[..., Any], world_size: int, state: Any, steps: int | None
) -> tuple[Batches, Any]:
    """What all ranks give in at most so many steps, in order, and the state behind that."""
    ranks, states = [], []
    for rank in range(world_size):
        loader = make_loader(rank=rank, world_size=world_size)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        ranks.append([_content(batch) for batch in islice(loader, steps)])
        states.append(loader.state_dict())
    assert all(other == states[0] for other in states), "ranks have different states after a step"
    assert len(set(map(len, ranks))) == 1, f"ranks step {list(map(len, ranks))} times"
    return [batch for batch in chain(*zip(*ranks, strict=True)) if batch], states[0]


def _content(batch: Any) -> tuple[Any, ...]:
    if getattr(batch, "is_filler", False):
        return ()
    return tuple(batch.sample_ids), batch.input_ids.tolist()


def _compare(found: Batches, whole: Batches, *, before: int, after: int, stop: int) -> None:
    layout = f"stopped after step {stop} of {before} ranks, resumed with {after}"
    for n, (one, other) in enumerate(zip(found, whole, strict=False)):
        assert one == other, f"{layout}: batch {n} has samples {one[0]}, expected {other[0]}"
    assert len(found) == len(whole), f"{layout}: {len(found)} batches, expected {len(whole)}"
