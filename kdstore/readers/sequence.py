"""The one sequence of batches that all ranks read, and a place in it as a small state.

A pure function of data, options, epoch and place: so it is the same for any number of ranks and
workers, and a state of one layout is a state of every other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kdstore.errors import StoreMismatchError, UsageError
from kdstore.readers.batches import BatchConfig, BatchPlan
from kdstore.readers.packing import Former, Packs
from kdstore.readers.planner import EpochPlanner, make_order

if TYPE_CHECKING:
    from kdstore.readers.mixture import Part

STATE_VERSION = 1
FILLER_TOKENS = 16
State = dict[str, Any]


class BatchSequence:
    """Batches from a state on, one epoch after the other; of all ranks, in order."""

    def __init__(self, parts: Sequence[Part], config: BatchConfig, state: State | None) -> None:
        self._fixed: State = {
            "version": STATE_VERSION,
            "data": _fingerprint(parts),
            "options": asdict(config),
        }
        _check(state, self._fixed)
        self.epoch, self._batch, places = _place(state, len(parts))
        pairs = zip(parts, places, strict=True)
        self._parts = [_Progress(part, config, place) for part, place in pairs]
        self.state: State = state or self._state()

    def steps(self, rank: int, world_size: int, *, group: int = 1) -> Iterator[BatchPlan]:
        """One rank's batches until the epoch ends, each with the state behind its step.

        All ranks get equally many, a multiple of ``group``: where there is none left for one, it is
        a filler.
        """
        ahead, count = self._next_batch(), 0
        if ahead is None:
            self._end_epoch()
        while ahead:
            batches = [ahead]
            while len(batches) < world_size and (batch := self._next_batch()):
                batches.append(batch)
            self._batch += len(batches)
            self.state = self._state()
            ahead = self._next_batch() if len(batches) == world_size else None
            if ahead is None:
                self._end_epoch()
            if rank < len(batches):
                yield batches[rank].plan(self.state)
            else:
                yield batches[0].filler(self.state)
            count += 1
            if ahead is None:
                for _ in range(-count % group):
                    yield batches[0].filler(self.state)

    def count(self) -> int:
        """Batches of all ranks that are left of the epoch; goes on to the next, without plans."""
        count = 0
        while self._next_batch():
            count += 1
        self._end_epoch()
        return count

    def _end_epoch(self) -> None:
        self.epoch, self._batch = self.epoch + 1, 0
        self.state = self._state()

    def _state(self) -> State:
        parts = [part.state for part in self._parts]
        return {**self._fixed, "epoch": self.epoch, "batch": self._batch, "parts": parts}

    def _next_batch(self) -> _Batch | None:
        """The next batch of the part that is furthest behind; None where the epoch ends."""
        while due := [part for part in self._parts if part.share(self.epoch) < 1]:
            batch = min(due, key=lambda part: part.share(self.epoch)).next_batch()
            if batch is not None:
                return batch
        return None


class _Batch:
    def __init__(self, packs: Packs, first: int, draw: int) -> None:
        self._packs, self._first, self._draw = packs, first, draw

    def plan(self, cursor: State, *, is_filler: bool = False) -> BatchPlan:
        pieces = np.array([piece for pack in self._packs for piece in pack], np.int64)
        pieces[:, 0] += self._first
        packs = np.array([len(pack) for pack in self._packs])
        return BatchPlan(pieces, packs, self._draw, cursor, is_filler)

    def filler(self, cursor: State) -> BatchPlan:
        """A few tokens of the first sample, to be read without their signal."""
        first = self._packs[0][0]
        short = first._replace(end=min(first.end, first.start + FILLER_TOKENS))
        return _Batch([[short]], self._first, self._draw).plan(cursor, is_filler=True)


class _Progress:
    """How far one part of the data is: its own epoch, and the samples taken of that."""

    def __init__(self, part: Part, config: BatchConfig, place: Sequence[Any]) -> None:
        self._part, self._config = part, config
        self._epoch, self._taken, self._position = place
        self._planner: EpochPlanner | None = None

    def share(self, epoch: int) -> float:
        """How much of what the part gives an epoch of the whole it has given in this one."""
        wanted = self._part.samples_per_epoch
        total = self._epoch * len(self._part.data) + self._taken
        return (total - epoch * wanted) / wanted if wanted else 1.0

    @property
    def state(self) -> list[Any]:
        position = self._planner.position if self._planner else self._position
        return [self._epoch, self._taken, position]

    def next_batch(self) -> _Batch | None:
        """The next batch; None where an epoch of this part ends."""
        data = self._part.data
        if self._planner is None:
            order = make_order(data, self._config, epoch=self._epoch)
            self._planner = EpochPlanner(order, Former(self._config), position=self._position)
        packs = self._planner.next_batch()
        if packs is None:
            self._epoch, self._taken, self._position, self._planner = self._epoch + 1, 0, "", None
            return None
        taken = self._taken + sum(piece.start == 0 for pack in packs for piece in pack)
        self._taken = min(taken, len(data) - 1)  # the last may have pieces that are still to come
        draw = self._config.draw
        return _Batch(
            packs, self._part.first, self._epoch % data.num_draws if draw is None else draw
        )


def epochs_before(parts: Sequence[Part], state: State) -> float:
    """Epochs that lie before a state, by samples: 1.25 where a quarter of the second is done."""
    wanted = sum(part.samples_per_epoch for part in parts)
    pairs = zip(parts, state["parts"], strict=True)
    given = sum(epoch * len(part.data) + taken for part, (epoch, taken, _) in pairs)
    share = given / wanted - state["epoch"] if wanted and state["batch"] else 0.0
    return float(state["epoch"] + min(max(share, 0.0), 1.0))


def _fingerprint(parts: Sequence[Part]) -> str:
    """Hex: which samples there are, and how often each is given."""
    names = [(part.data.fingerprint, len(part.data), part.samples_per_epoch) for part in parts]
    return xxhash.xxh3_64_hexdigest(repr(names).encode())


def _check(state: Any, fixed: State) -> None:
    """UsageError or StoreMismatchError unless a state is of these data and options."""
    if state is None:
        return
    if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
        version = state.get("version") if isinstance(state, Mapping) else state
        raise UsageError(
            "this is no state that this kdstore can go on from",
            where="load_state_dict",
            expected=f"what state_dict() gives, version {STATE_VERSION}",
            got=version,
        )
    for name, value in fixed["options"].items():
        stored = state.get("options", {}).get(name)
        if stored != value:
            raise UsageError(
                f"the state is of a loader with another {name}",
                where="load_state_dict",
                expected=f"{name}={stored!r}",
                got=f"{name}={value!r}",
                todo="make the loader with the same options; ranks, workers and epochs may differ",
            )
    if state.get("data") != fixed["data"]:
        raise StoreMismatchError(
            "the state is of other data",
            where="load_state_dict",
            expected=state.get("data"),
            got=fixed["data"],
            todo="open the same stores, with the same shards: an unfinished one may have grown",
        )


def _place(state: State | None, num_parts: int) -> tuple[int, int, list[Any]]:
    if state is None:
        return 0, 0, [[0, 0, ""]] * num_parts
    epoch, batch, places = state.get("epoch"), state.get("batch"), state.get("parts", [])
    numbers = [epoch, batch, *(number for place in places for number in place[:2])]
    if len(places) != num_parts or not all(type(n) is int and n >= 0 for n in numbers):
        raise UsageError(
            "the loader's state is damaged",
            where="load_state_dict",
            expected=f"a place in each of {num_parts} parts",
            got=state,
        )
    return numbers[0], numbers[1], places
