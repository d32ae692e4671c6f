"""Batches for training, from any number of ranks and workers, that can go on from any step."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kdstore.errors import UsageError
from kdstore.readers.batches import BatchConfig, BatchPlan
from kdstore.readers.collate import Batch, Collator
from kdstore.readers.dataset import BatchDataset, PositionFilter
from kdstore.readers.mixture import parts_of
from kdstore.readers.planner import make_order
from kdstore.readers.ranks import rank_and_world_size
from kdstore.readers.sequence import BatchSequence, epochs_before
from kdstore.readers.weights import TokenWeights

if TYPE_CHECKING:
    from kdstore.readers.mixture import Mixture, Part
    from kdstore.readers.samples import Samples

PLANS_AHEAD = 2  # batches of a process whose row groups are read in the background


class Loader:
    """A rank's batches of a store, or of several.

    Iterating goes on where the last iteration, or the state that was loaded, left off, and ends
    with an epoch whose number is a multiple of ``epochs``. Options beside those of
    ``kdstore.readers.batches.BatchConfig``, which say what the batches are:

    * ``rank``, ``world_size``: by default of torch.distributed, or of the environment
    * ``columns``: what is read beside token ids: ``entries``, names of scalars, ``spans``, …; by
      default everything, which is then checked by row hashes too
    * ``num_workers``: processes that read ahead; 0 reads in this one.
      ``multiprocessing_context``: ``fork`` or ``spawn``
    * ``keep``: which scored positions are trained on; ``weights``: how much each of them counts
    * ``pad_id``: token id where a row has no sample
    * ``group``: steps of an epoch are a multiple of this, made so by fillers: the batches of one
      optimizer step, where gradients are accumulated
    """

    def __init__(
        self,
        data: Samples | Mixture,
        *,
        epochs: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
        columns: Sequence[str] | None = None,
        num_workers: int = 0,
        multiprocessing_context: str | None = None,
        keep: PositionFilter | None = None,
        weights: TokenWeights | None = None,
        pad_id: int = 0,
        group: int = 1,
        **batches: Any,
    ) -> None:
        _check_positive("epochs", epochs)
        _check_positive("group", group)
        self.rank, self.world_size = rank_and_world_size(rank, world_size)
        self._config, self._epochs, self._group = BatchConfig(**batches), epochs, group
        if columns is not None:
            _check_spans(columns, keep, weights)
            data = data.with_columns(columns)
        self._parts = parts_of(data)
        _check_workers(num_workers, self._parts)
        data.reserve(**_reserve(self._parts, self._config))
        self._workers, self._context = num_workers, multiprocessing_context
        self._dataset = BatchDataset(data, keep=keep)
        self._collate = Collator(
            pack=self._config.pack,
            pad_id=pad_id,
            max_length=self._config.max_length,
            weights=weights,
        )
        self._state = BatchSequence(self._parts, self._config, None).state

    def __iter__(self) -> Generator[Batch, None, None]:
        for batch in self._batches():
            self._state = batch.cursor
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last batch that was given out: JSON of less than 1 kB.

        It is a place in the one sequence of batches of all ranks, so each rank has the same, and
        any number of ranks and workers can go on from it.
        """
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: of ``state_dict``, or the ``cursor`` of a batch.

        Raises UsageError for a state of other options, StoreMismatchError for one of other data.
        """
        self._state = BatchSequence(self._parts, self._config, state).state

    def count_steps(self, epochs: int = 1) -> list[int]:
        """Batches of this rank, fillers included, in what is left of the epoch and in those after.

        Planned from the lengths of samples, as reading is, and nothing is decoded. All ranks have
        equally many.
        """
        sequence = BatchSequence(self._parts, self._config, self._state)
        per_group = self.world_size * self._group
        return [-(-sequence.count() // per_group) * self._group for _ in range(epochs)]

    @property
    def is_empty(self) -> bool:
        """Whether no epoch has a batch: there is no sample, or all are left out."""
        return next(BatchSequence(self._parts, self._config, None).steps(0, 1), None) is None

    def epochs_before(self, state: dict[str, Any]) -> float:
        """Epochs before a state, by samples: 1.25 where a quarter of the second is done."""
        return epochs_before(self._parts, state)

    def _batches(self) -> Iterator[Batch]:
        plans = ahead(self._plans(), max(self._workers, 1) * PLANS_AHEAD)
        if not self._workers:
            return (self._collate(self._dataset.__getitems__(plan)) for plan in plans)
        return iter(
            torch.utils.data.DataLoader(
                self._dataset,
                batch_sampler=plans,  # type: ignore[arg-type]
                collate_fn=self._collate,
                num_workers=self._workers,
                multiprocessing_context=self._context,
                generator=torch.Generator(),  # else each start would draw from the global one
            )
        )

    def _plans(self) -> Iterator[BatchPlan]:
        sequence = BatchSequence(self._parts, self._config, self._state)
        last = (sequence.epoch // self._epochs + 1) * self._epochs
        while sequence.epoch < last:
            yield from sequence.steps(self.rank, self.world_size, group=self._group)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name} of a loader cannot work", expected="at least 1", got=value)


def _check_workers(num_workers: int, parts: Sequence[Part]) -> None:
    online = [part.data for part in parts if part.data.in_one_process]
    if online and num_workers:
        raise UsageError(
            "workers cannot read what an online teacher scores: it is in this process",
            where=f"{online[0]}",
            expected="num_workers 0",
            got=num_workers,
            todo="leave workers out, or dump a store and train on that",
        )


def _check_spans(
    columns: Sequence[str], keep: PositionFilter | None, weights: TokenWeights | None
) -> None:
    """UsageError if positions go by the kinds of spans that are not read: none would be of any."""
    by_kind = bool(keep and keep.kinds is not None) or bool(weights and weights.kinds)
    if by_kind and "spans" not in columns:
        raise UsageError(
            "positions cannot go by the kinds of spans that are not read",
            where="keep or weights",
            expected='"spans" among the columns',
            got=", ".join(columns),
            todo='add "spans" to columns',
        )


def ahead(plans: Iterable[BatchPlan], distance: int) -> Iterator[BatchPlan]:
    """The same plans, each with what the plan so far behind it will read."""
    waiting: deque[BatchPlan] = deque()
    for plan in plans:
        waiting.append(plan)
        if len(waiting) > distance:
            yield replace(waiting.popleft(), ahead=plan[:])
    yield from waiting


def _reserve(parts: Sequence[Part], config: BatchConfig) -> dict[str, int]:
    """Row groups and shards that are read from at once.

    A window of each stream, and as many while it goes from one to the next or reads ahead.
    """
    orders = [make_order(part.data, config, epoch=0) for part in parts]
    streams = max((order.streams for order in orders), default=1)
    return {
        "row_groups": 2 * streams * config.window,
        "shards": 2 * streams * config.shards_at_once,
    }
