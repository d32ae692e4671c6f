"""The helper finds loaders that are not resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kdstore
from kdstore.testing import assert_resumable


class Loader:
    """Batches 0 to 9; ``fault`` says what is wrong with it."""

    def __init__(self, rank: int, world_size: int, fault: str) -> None:
        self.rank, self.world_size, self.fault = rank, world_size, fault
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < 10:
            number = self.at + self.rank
            self.at += self.world_size
            if self.fault == "order by world size":
                number = (number * self.world_size) % 10
            ids = np.array([[number]])
            yield SimpleNamespace(sample_ids=[number], input_ids=ids, is_filler=number > 9)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at + (self.rank if self.fault == "ranks differ" else 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = {"repeats": state["at"] - 1, "loses": state["at"] + 1, "forgets": 0}.get(
            self.fault, state["at"]
        )


def of(fault: str) -> Callable[..., Loader]:
    return lambda rank, world_size: Loader(rank, world_size, fault)


def test_a_resumable_loader_passes(dump: Callable[..., Path]) -> None:
    assert_resumable(of(""), world_sizes=(1, 2, 3))
    store = kdstore.open(dump())

    def make(rank: int, world_size: int) -> Any:
        return store.loader(batch_tokens=200, pack=True, rank=rank, world_size=world_size)

    assert_resumable(make, world_sizes=(1, 3), max_stops=4)


@pytest.mark.parametrize(
    "fault", ["repeats", "loses", "forgets", "order by world size", "ranks differ"]
)
def test_others_do_not(fault: str) -> None:
    with pytest.raises(AssertionError, match=r"batch|ranks"):
        assert_resumable(of(fault), world_sizes=(1, 2, 3))


def test_a_loader_without_batches_proves_nothing() -> None:
    def empty(rank: int, world_size: int) -> Loader:
        loader = Loader(rank, world_size, "")
        loader.at = 10
        return loader

    with pytest.raises(AssertionError, match="no batch"):
        assert_resumable(empty)
