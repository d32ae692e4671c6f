"""Lanes: what is in them is bounded in items and bytes, and either end can end both."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import pytest

from kdstore.writers.lane import Lane

WAIT_S = 30


def started(work: Callable[[], object]) -> Thread:
    thread = Thread(target=work, daemon=True)
    thread.start()
    return thread


def assert_ends(thread: Thread) -> None:
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_everything_comes_out_in_order() -> None:
    lane: Lane[int] = Lane(max_items=2, max_bytes=10)
    found: list[int] = []
    reader = started(lambda: found.extend(lane))
    for item in range(100):
        assert lane.put(item, num_bytes=item % 15)
    lane.close()
    assert_ends(reader)
    assert found == list(range(100))


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [([], True), ([3], True), ([3, 3], False), ([8], False), ([50], False)],
)
def test_what_fits(sizes: list[int], fits: bool) -> None:
    """Two items at most, ten bytes at most, and anything into an empty lane."""
    lane: Lane[int] = Lane(max_items=2, max_bytes=10)
    for size in sizes:
        assert lane.put(0, num_bytes=size)
    writer = started(lambda: lane.put(1, num_bytes=4))
    writer.join(WAIT_S if fits else 0.1)
    assert writer.is_alive() is not fits
    lane.shut()
    assert_ends(writer)


def test_an_item_is_in_the_lane_until_the_next_is_asked_for() -> None:
    lane: Lane[str] = Lane(max_items=1, max_bytes=10)
    lane.put("a", num_bytes=1)
    items = iter(lane)
    assert next(items) == "a"
    writer = started(lambda: lane.put("b", num_bytes=1))
    writer.join(0.1)
    assert writer.is_alive()
    assert next(items) == "b"
    assert_ends(writer)


def test_shutting_ends_both_sides_and_drops_what_waits() -> None:
    full: Lane[str] = Lane(max_items=1, max_bytes=10)
    full.put("a", num_bytes=1)
    answers: list[bool] = []
    writers = [
        started(lambda: answers.append(full.put("b", num_bytes=1))),
        started(lambda: answers.append(full.wait_for_room())),
    ]
    full.shut()
    for writer in writers:
        assert_ends(writer)
    assert answers == [False, False]
    assert list(full) == []
    empty: Lane[str] = Lane(max_items=1, max_bytes=10)
    found: list[str] = []
    reader = started(lambda: found.extend(empty))
    empty.shut()
    assert_ends(reader)
    assert found == []
