"""The tap: hidden states of scored rows in, signals out, inside an engine's worker.

It knows nothing of an engine. A hook (``runner_v1``, ``runner_v2``) tells it, step by step, which
rows of which requests were computed; ``take`` hands out what is complete. Rows that come again,
after a preemption, are not scored again: the first answer stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdstore.audit import AUDIT_SELECTION, audited_rows
from kdstore.errors import TeacherError
from kdstore.hashing import RowKeys
from kdstore.select import SelectionStats, select_with_audit
from kdstore.select.driver import head_rows
from kdstore.select.sharded import fits_ranks, gather_ranks, select_gathered
from kdstore.signal import SparseSignal
from kdstore.teachers.vllm.packing import Answer, Tally, pack
from kdstore.teachers.vllm.request import TapRequest, TapRule
from kdstore.teachers.vllm.shards import HeadShard

_Select = Callable[[], tuple[SparseSignal, SparseSignal]]


@dataclass(frozen=True, eq=False)
class Computed:
    """Rows of one request that a step computed.

    Row ``first + i`` of the sequence lies at ``offset + i`` of the step's hidden states, for i from
    0 to before ``count``; it answers position ``first + i + 1``. ``tokens(positions)`` are the
    tokens that stand at some positions, int64 on any device.
    """

    request: TapRequest
    first: int
    count: int
    offset: int
    tokens: Callable[[NDArray[np.int64]], Tensor]


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one request to select from."""

    request: TapRequest
    rows_S: NDArray[np.int64]
    positions_S: NDArray[np.int64]
    labels_S: Tensor


class Tap:
    """Selections of one worker.

    ``head`` gives the logits [C, V] of hidden states [C, D], or None on a rank that holds none;
    ranks call it equally often. ``vocab_size`` is how wide they are. Where all ranks hold the same
    logits, one ``answers``. With a ``shard`` of the head they need not, where a rule allows it.
    """

    def __init__(
        self,
        head: Callable[[Tensor], Tensor | None],
        *,
        vocab_size: int,
        answers: bool = True,
        shard: HeadShard | None = None,
    ) -> None:
        self._head, self._vocab_size, self._shard = head, vocab_size, shard
        self._selects = answers
        self._answers: dict[int, Answer] = {}
        self._next: dict[int, int] = {}  # key -> first position that is not answered yet
        self._stats, self._tally = SelectionStats(), Tally()

    def step(self, hidden_TD: Tensor, computed: Sequence[Computed]) -> None:
        """Select from the rows that a step computed.

        An error is kept for ``take``: raised here, it would end the engine without a word.
        """
        waiting = [rows for rows in map(self._wanted, computed) if len(rows.rows_S)]
        waiting.sort(key=lambda rows: repr(rows.request.rule))
        for rule, group in groupby(waiting, key=lambda rows: rows.request.rule):
            self._select(hidden_TD, rule, list(group))

    def take(self, keys: Sequence[int]) -> bytes:
        """The answers of some requests, which are forgotten; ``unpack`` reads them."""
        answers = [self._answers.pop(key, Answer()) for key in keys]
        for key in keys:
            self._next.pop(key, None)
        stats, tally = self._stats, self._tally
        self._stats, self._tally = SelectionStats(), Tally()
        tally = replace(tally, num_positions=stats.num_positions, padding_mass=stats.padding_mass)
        return pack(answers, tally)

    def _wanted(self, computed: Computed) -> _Rows:
        request = computed.request
        start = max(computed.first + 1, self._next.get(request.key, 0))
        positions = request.positions_in(start, computed.first + computed.count + 1)
        if len(positions):
            self._next[request.key] = int(positions[-1]) + 1
        rows = positions - 1 - computed.first + computed.offset
        return _Rows(request, rows, positions, computed.tokens(positions))

    def _select(self, hidden_TD: Tensor, rule: TapRule, waiting: Sequence[_Rows]) -> None:
        rows_S = np.concatenate([rows.rows_S for rows in waiting])
        labels_S = torch.cat([rows.labels_S for rows in waiting])
        hashes = np.array([rows.request.sample_hash for rows in waiting], np.uint64)
        lengths = [len(rows.rows_S) for rows in waiting]
        positions_S = np.concatenate([rows.positions_S for rows in waiting])
        keys = RowKeys(rule.seed, np.repeat(hashes, lengths), positions_S, rule.draw)
        found = list(self._chunks(hidden_TD, rule, keys, rows_S, labels_S))
        if self._tally.error or not found:  # a rank without logits finds nothing
            return
        signals, audits = zip(*found, strict=True)
        signal, audit = SparseSignal.concat(signals), SparseSignal.concat(audits)
        bounds = np.cumsum([0, *lengths])
        audited = np.searchsorted(audited_rows(keys, fraction=rule.audit_fraction), bounds)
        for rows, (start, end), (first, last) in zip(
            waiting, pairwise(bounds), pairwise(audited), strict=True
        ):
            answer = self._answers.setdefault(rows.request.key, Answer())
            answer.positions.append(rows.positions_S)
            answer.signals.append(signal[start:end])
            answer.audits.append(audit[first:last])

    def _chunks(
        self,
        hidden_TD: Tensor,
        rule: TapRule,
        keys: RowKeys,
        rows_S: NDArray[np.int64],
        labels_S: Tensor,
    ) -> Iterator[tuple[SparseSignal, SparseSignal]]:
        """Signal and audit of all rows, so many at once as their logits have room."""
        rows_on_device = torch.from_numpy(rows_S).to(hidden_TD.device)
        labels_on_device = labels_S.to(hidden_TD.device)
        size = head_rows(self._vocab_size, hidden_TD.device)
        for start in range(0, len(rows_S), size):
            chunk = slice(start, start + size)
            hidden = hidden_TD[rows_on_device[chunk]]
            select = self._run_head(hidden, labels_on_device[chunk], rule, keys[chunk])
            if select is None or not self._selects or self._tally.error:
                continue  # but the other ranks count on the head's call
            found = self._selected(select)
            if found is not None:
                yield found

    def _run_head(
        self, hidden_CD: Tensor, labels_C: Tensor, rule: TapRule, keys: RowKeys
    ) -> _Select | None:
        """All that ranks do together; what gives the signals then, None on a rank without."""
        started_s = time.process_time()
        shard = self._shard
        if shard is not None and fits_ranks(
            rule.parsed, rule.scalars, audit_fraction=rule.audit_fraction
        ):
            found: _Select | None = self._of_ranks(shard, hidden_CD, labels_C, rule, keys)
        else:
            logits = self._head(hidden_CD)
            found = None
            if logits is not None:
                found = partial(self._of_logits, logits, labels_C, rule, keys)
        self._count(head_s=time.process_time() - started_s)
        return found

    def _of_ranks(
        self, shard: HeadShard, hidden_CD: Tensor, labels_C: Tensor, rule: TapRule, keys: RowKeys
    ) -> _Select:
        gathered = gather_ranks(
            shard.local(hidden_CD),
            labels_C,
            first_id=shard.first_id,
            k=rule.parsed.typical_entries(self._vocab_size),
            num_ids=rule.num_ids,
            gather=shard.gather,
        )
        return lambda: (
            select_gathered(
                gathered,
                selection=rule.parsed,
                keys=keys,
                scalars=rule.scalars,
                stats=self._stats,
            ),
            SparseSignal.empty(AUDIT_SELECTION),
        )

    def _of_logits(
        self, logits_CV: Tensor, labels_C: Tensor, rule: TapRule, keys: RowKeys
    ) -> tuple[SparseSignal, SparseSignal]:
        self._check_width(logits_CV)
        return select_with_audit(
            logits_CV,
            labels_C,
            selection=rule.parsed,
            keys=keys,
            audit_fraction=rule.audit_fraction,
            scalars=rule.scalars,
            num_ids=rule.num_ids,
            stats=self._stats,
        )

    def _selected(self, select: _Select) -> tuple[SparseSignal, SparseSignal] | None:
        started_s = time.process_time()
        try:
            return select()
        except Exception as error:  # of whatever kind, it is the front end's to raise
            self._tally = replace(self._tally, error=f"{type(error).__name__}: {error}")
            return None
        finally:
            self._count(select_s=time.process_time() - started_s)

    def _count(self, *, head_s: float = 0.0, select_s: float = 0.0) -> None:
        tally = self._tally
        self._tally = replace(
            tally, head_s=tally.head_s + head_s, select_s=tally.select_s + select_s
        )

    def _check_width(self, logits: Tensor) -> None:
        if logits.shape[1] != self._vocab_size:
            raise TeacherError(
                "the engine's logits are not as wide as the model's config says",
                expected=f"vocab_size {self._vocab_size}",
                got=f"logits of width {logits.shape[1]}",
                todo="correct vocab_size in the teacher's config.json",
            )
