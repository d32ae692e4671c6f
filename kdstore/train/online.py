"""OnlineSamples: what a loader reads where a teacher in this process takes the place of a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy as shallow_copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from kdstore.align import TokenTable
from kdstore.errors import UsageError
from kdstore.hashing import sha256_hex
from kdstore.readers.outline import Outline
from kdstore.readers.ranks import rank_and_world_size
from kdstore.readers.samples import Index, Samples
from kdstore.sample import Sample
from kdstore.select import parse_selection
from kdstore.teachers.hf_load import default_device
from kdstore.teachers.scoring import Scoring
from kdstore.train.answers import Answers, Fresh, LazyTeacher, Place, Recording

if TYPE_CHECKING:
    from kdstore.readers.store import Store
    from kdstore.train.config import TeacherConfig

# Of a row group before compression; an order is made of them, so this stays as it is.
GROUP_BYTES = 8 << 20


class OnlineSamples(Samples):
    """The samples of a text, scored by a teacher in this process when they are asked for.

    Order and shards are those of the plan that a dump of the same options makes: a unit is a
    shard. Samples that are asked for together are scored together. Without ``record``, draw r of a
    sampled selection is its r-th, and there is no end of draws; with it, a unit is scored and
    committed when one of its samples is first asked for, and read from the store from then on.

    ``cache_dir`` and ``cache_bytes`` are those of ``kdstore.open``, for a remote ``record``.

    Nothing is loaded before a sample is asked for. Raises what ``Scoring.of`` and ``open_dump``
    raise: UsageError, TeacherError, InputError, StoreMismatchError.
    """

    in_one_process = True

    def __init__(
        self,
        config: TeacherConfig,
        *,
        quiet: bool = False,
        cache_dir: str | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.config = config
        scoring = Scoring.of(replace(config, device=config.device or _device_of_rank()))
        quiet = quiet or rank_and_world_size(None, None)[0] != 0
        self._teacher = LazyTeacher(scoring)
        self._answers: Answers
        if config.record is None:
            self._answers = Fresh(scoring, self._teacher, quiet=quiet)
        else:
            self._answers = Recording(
                scoring,
                self._teacher,
                url=config.record,
                quiet=quiet,
                cache_dir=cache_dir,
                cache_bytes=cache_bytes,
            )
        table = self._answers.plan.table
        units, tokens = table["unit"].to_numpy(), table["num_tokens"].to_numpy()
        self._lengths = tokens.astype(np.int32)
        self._scored = table["num_scored"].to_numpy().astype(np.int32)
        self.shard_rows = np.bincount(units).astype(np.int64)
        self.first_rows = np.append(np.int64(0), np.cumsum(self.shard_rows))
        self.shard_tokens = np.add.reduceat(tokens.astype(np.int64), self.first_rows[:-1])

    def __repr__(self) -> str:
        return f"OnlineSamples({self.config.path!r}, {len(self)} samples)"

    def __getstate__(self) -> dict[str, Any]:
        raise UsageError(
            "an online teacher stays in its process",
            where=f"{self}",
            expected="no other process that reads it",
            got="an attempt to pickle it",
            todo="set num_workers to 0, or dump a store and train on that",
        )

    def __copy__(self) -> OnlineSamples:
        other = object.__new__(OnlineSamples)
        vars(other).update(vars(self))
        return other

    def __getitems__(self, indices: Sequence[Index]) -> list[Sample]:
        """Several samples in the order asked for, scored together.

        Each is a sample of its own, also where an index comes twice.
        """
        places = self._all_places(indices)
        return self._answers.samples(places) if places else []

    def _all_places(self, indices: Sequence[Index]) -> list[Place]:
        places = list(zip(*self._places(indices), strict=True))
        for _, _, draw in places:
            if not 0 <= draw < self.num_draws:
                raise UsageError(
                    "no such draw", where=f"{self}", expected=f"0 to {self.num_draws - 1}", got=draw
                )
        return places

    def outline(self, shard_index: int) -> Outline:
        """Row groups and lengths of the n-th unit, as planned; about those of its shard."""
        unit = range(self.num_shards)[shard_index]
        rows = slice(*self.first_rows[unit : unit + 2].tolist())
        entries = parse_selection(self.config.select).typical_entries(self.vocab_size)
        lengths, scored = self._lengths[rows], self._scored[rows].astype(np.int64)
        groups = np.cumsum(4 * lengths + (8 + 3 * entries) * scored) // GROUP_BYTES
        return Outline(np.unique(groups, return_counts=True)[1].astype(np.int64), lengths)

    def with_columns(self, columns: Sequence[str]) -> OnlineSamples:
        """The same samples, of which only some columns are there."""
        other = shallow_copy(self)
        other._answers = self._answers.with_columns(columns)
        return other

    def prefetch(self, indices: Sequence[Index]) -> None:
        """Begin to read what is recorded, in the background; returns at once."""
        self._answers.prefetch(self._all_places(indices))

    def reserve(self, *, shards: int = 0, row_groups: int = 0) -> None:
        """Keep at least so many shards open and row groups in memory of what is recorded.

        Twice as many: what was planned as one row group may lie in two of a shard.
        """
        self.store.reserve(shards=shards, row_groups=2 * row_groups)

    @property
    def store(self) -> Store:
        """What is recorded; without ``record`` a store of the same header without a sample."""
        return self._answers.store

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell which samples these are, and whether they are recorded."""
        kind = "drawn anew" if self.config.record is None else "recorded"
        return sha256_hex(f"{self.store.config_digest} {kind}".encode())[:16]

    @property
    def vocab_size(self) -> int:
        """V, the width of the teacher's logits."""
        return self.store.vocab_size

    @property
    def vocab_digest(self) -> str:
        """Fingerprint of the teacher's token table."""
        return self.store.vocab_digest

    @property
    def is_complete(self) -> bool:
        """Whether every unit is recorded; True without ``record``, since nothing is missing."""
        return self.config.record is None or self.store.is_complete

    @property
    def num_draws(self) -> int:
        """As many as epochs for a sampled selection that is not recorded, else 1."""
        return self._answers.num_draws

    def refresh(self) -> int:
        """Look for what others have recorded; 0, since samples are those that were planned."""
        if not self.is_complete:
            self.store.refresh()
        return 0

    def find(self, sample_id: str) -> int:
        """The index of a sample's id; KeyError if there is none."""
        index: int = pc.index(self._answers.plan.table["sample_id"], sample_id).as_py()
        if index < 0:
            raise KeyError(sample_id)
        return index

    def token_table(self) -> TokenTable:
        """The bytes behind each token id."""
        return self.store.token_table()

    def close(self) -> None:
        """Close all shards and free the teacher's memory; a later read loads it anew."""
        self._teacher.release()
        self.store.close()


def _device_of_rank() -> str:
    """The GPU of this process, where there are several."""
    device = default_device()
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if device == "cuda" and local_rank else device
