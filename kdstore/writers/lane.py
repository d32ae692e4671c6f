"""Lanes: work on its way from one thread to the next, bounded in items and in bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Condition
from typing import Generic, TypeVar

T = TypeVar("T")


class Lane(Generic[T]):
    """At most ``max_items`` and ``max_bytes`` are in it; a larger item is let in alone.

    One thread puts, another iterates. An item is in the lane until the next one is asked for.

    >>> lane: Lane[str] = Lane(max_items=2, max_bytes=10)
    >>> lane.put("a", num_bytes=4)
    True
    >>> lane.close()
    >>> list(lane)
    ['a']
    """

    def __init__(self, *, max_items: int, max_bytes: int) -> None:
        self._max_items, self._max_bytes = max_items, max_bytes
        self._changed = Condition()
        self._waiting: deque[T] = deque()
        self._sizes: deque[int] = deque()
        self._closed = self._shut = False

    def wait_for_room(self, *, num_bytes: int = 0) -> bool:
        """Waits until an item of that size fits; False if the lane was shut."""
        with self._changed:
            self._changed.wait_for(lambda: self._shut or self._fits(num_bytes))
            return not self._shut

    def put(self, item: T, *, num_bytes: int) -> bool:
        """Lets the item in once it fits; False, and it is dropped, if the lane was shut."""
        with self._changed:
            if self.wait_for_room(num_bytes=num_bytes):
                self._waiting.append(item)
                self._sizes.append(num_bytes)
                self._changed.notify_all()
            return not self._shut

    def close(self) -> None:
        """Nothing more is put: what is in the lane is still given out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def shut(self) -> None:
        """Ends both sides at once; what nobody has taken is dropped."""
        with self._changed:
            self._shut = True
            self._waiting.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while found := self._take():
            yield found.pop()
            with self._changed:
                self._sizes.popleft()
                self._changed.notify_all()

    def _take(self) -> list[T]:
        """The next item in a list, which need not keep it; an empty one at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._shut or self._closed or bool(self._waiting))
            return [self._waiting.popleft()] if self._waiting else []

    def _fits(self, num_bytes: int) -> bool:
        few = len(self._sizes) < self._max_items
        return not self._sizes or (few and sum(self._sizes) + num_bytes <= self._max_bytes)
