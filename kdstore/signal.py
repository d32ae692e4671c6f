"""SparseSignal: what a teacher said about S positions, as flat numpy arrays.

Shape suffixes used everywhere: S scored positions, N entries, T tokens, B batch, K padded
entries, V vocabulary (width of the teacher's logits), D hidden size. Logs are natural.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import SignalError

if TYPE_CHECKING:
    import torch


NO_ENTRIES = "none"  # the selection of a signal of which only scalars were read


@dataclass(frozen=True, eq=False)
class SparseSignal:
    """Sparse distributions of S positions in CSR form, with their rest and scalars.

    Entries of position s are ``indptr[s]:indptr[s + 1]``, ascending by token id.

    * ``selection``: the rule that picked the entries, such as ``"topk:k=50"``
    * ``indptr`` int64 [S+1], ``ids_N`` int32, ``logprobs_N`` float32
    * ``rest_S`` float32: log mass that the entries do not carry, -inf where they sum to one
    * ``counts_N`` int32: exact multinomial counts (``counts`` only)
    * ``tail_N`` bool: which entries are sampled and share the tail weight (``pps`` only)
    * ``scalars``: float32 [S] each, such as ``label_logprob``, ``label_rank``, ``entropy``

    >>> import numpy as np
    >>> signal = SparseSignal.from_arrays(
    ...     "topk:k=2", [0, 2], [3, 7], np.log([0.5, 0.25]), rest_S=np.log([0.25]))
    >>> signal.to_dense(8)[0, 7].round(2).item()
    0.25
    """

    selection: str
    indptr: NDArray[np.int64]
    ids_N: NDArray[np.int32]
    logprobs_N: NDArray[np.float32]
    rest_S: NDArray[np.float32]
    counts_N: NDArray[np.int32] | None = None
    tail_N: NDArray[np.bool_] | None = None
    scalars: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_shapes(self)

    @classmethod
    def from_arrays(
        cls,
        selection: str,
        indptr: Any,
        ids_N: Any,
        logprobs_N: Any,
        *,
        rest_S: Any = None,
        counts_N: Any = None,
        tail_N: Any = None,
        scalars: Mapping[str, Any] | None = None,
    ) -> SparseSignal:
        """A signal from anything array-like, converted to the dtypes of the class."""
        indptr = np.asarray(indptr, dtype=np.int64)
        rest = np.full(len(indptr) - 1, -np.inf) if rest_S is None else rest_S
        return cls(
            selection,
            indptr,
            np.asarray(ids_N, dtype=np.int32),
            np.asarray(logprobs_N, dtype=np.float32),
            np.asarray(rest, dtype=np.float32),
            None if counts_N is None else np.asarray(counts_N, dtype=np.int32),
            None if tail_N is None else np.asarray(tail_N, dtype=np.bool_),
            {name: np.asarray(v, dtype=np.float32) for name, v in (scalars or {}).items()},
        )

    @classmethod
    def empty(cls, selection: str) -> SparseSignal:
        """A signal of no positions, without scalars."""
        return cls.from_arrays(selection, [0], [], [], counts_N=[], tail_N=[])

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def num_entries(self) -> int:
        """Number of entries N over all positions."""
        return len(self.ids_N)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        arrays = (self.indptr, self.ids_N, self.logprobs_N, self.rest_S, self.counts_N, self.tail_N)
        found = [array for array in (*arrays, *self.scalars.values()) if array is not None]
        return sum(array.nbytes for array in found)

    @property
    def entries_S(self) -> NDArray[np.int64]:
        """int64 [S]: number of entries of each position."""
        return np.diff(self.indptr)

    @cached_property  # encoding asks for it again and again
    def rows_N(self) -> NDArray[np.int64]:
        """int64 [N]: the position each entry belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.entries_S)

    @property
    def tail_counts_S(self) -> NDArray[np.int64]:
        """int64 [S]: number of sampled tail entries of each position (zeros unless ``pps``)."""
        if self.tail_N is None:
            return np.zeros(len(self), dtype=np.int64)
        return segment_sum(self.tail_N.astype(np.int64), self.indptr)

    @property
    def kept_mass_S(self) -> NDArray[np.float64]:
        """float64 [S]: probability that the entries carry."""
        return segment_sum(np.exp(self.logprobs_N.astype(np.float64)), self.indptr)

    def __getitem__(self, rows: slice | NDArray[Any]) -> SparseSignal:
        """The signal of some positions: a slice, an index array or a boolean mask."""
        if isinstance(rows, slice) and rows.step in (None, 1):
            return self._part(*rows.indices(len(self))[:2])
        picked = np.arange(len(self))[rows]
        lengths = self.entries_S[picked]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.repeat(self.indptr[picked] - indptr[:-1], lengths) + np.arange(indptr[-1])
        return SparseSignal(
            self.selection,
            indptr,
            self.ids_N[entries],
            self.logprobs_N[entries],
            self.rest_S[picked],
            None if self.counts_N is None else self.counts_N[entries],
            None if self.tail_N is None else self.tail_N[entries],
            {name: values[picked] for name, values in self.scalars.items()},
        )

    def _part(self, start: int, end: int) -> SparseSignal:
        """Positions that follow each other: views, no copies."""
        bounds = self.indptr[start : max(start, end) + 1]
        entries, positions = slice(int(bounds[0]), int(bounds[-1])), slice(start, end)
        part: SparseSignal = object.__new__(SparseSignal)  # not checked again: readers make many
        vars(part).update(
            _whole=(self, start, max(start, end)),
            selection=self.selection,
            indptr=bounds - bounds[0],
            ids_N=self.ids_N[entries],
            logprobs_N=self.logprobs_N[entries],
            rest_S=self.rest_S[positions],
            counts_N=None if self.counts_N is None else self.counts_N[entries],
            tail_N=None if self.tail_N is None else self.tail_N[entries],
            scalars={name: values[positions] for name, values in self.scalars.items()},
        )
        return part

    def to_dense(self, vocab_size: int) -> NDArray[np.float64]:
        """float64 [S, V] probabilities; ids without an entry are zero, rest is not spread."""
        if self.num_entries and int(self.ids_N.max()) >= vocab_size:
            raise SignalError(
                "token id outside the vocabulary",
                expected=f"ids below {vocab_size}",
                got=int(self.ids_N.max()),
            )
        dense = np.zeros((len(self), vocab_size), dtype=np.float64)
        dense[self.rows_N, self.ids_N] = np.exp(self.logprobs_N.astype(np.float64))
        return dense

    def padded(
        self, width: int, *, pad_id: int = -1
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """``ids`` int32 and ``logprobs`` float32 [S, K], padded with ``pad_id`` and -inf.

        Raises SignalError if a position has more than ``width`` entries: nothing is dropped.
        """
        lengths = self.entries_S
        if len(self) and int(lengths.max()) > width:
            raise SignalError(
                "a position has more entries than the padded width",
                where=f"position {int(lengths.argmax())} of the signal",
                expected=f"at most {width}",
                got=int(lengths.max()),
                todo=f"call padded({int(lengths.max())}) or use the CSR arrays",
            )
        ids = np.full((len(self), width), pad_id, dtype=np.int32)
        logprobs = np.full((len(self), width), -np.inf, dtype=np.float32)
        filled = np.arange(width)[None, :] < lengths[:, None]
        ids[filled] = self.ids_N
        logprobs[filled] = self.logprobs_N
        return ids, logprobs

    def to_torch(self, device: str | torch.device = "cpu") -> TorchSignal:
        """The same arrays as torch tensors on a device."""
        import torch

        def tensor(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        return TorchSignal(
            self.selection,
            tensor(self.indptr),
            tensor(self.ids_N),
            tensor(self.logprobs_N),
            tensor(self.rest_S),
            {name: tensor(values) for name, values in self.scalars.items()},
        )

    @staticmethod
    def concat(signals: Sequence[SparseSignal]) -> SparseSignal:
        """The positions of several signals of one selection, one after the other.

        Signals of no positions add nothing. Raises SignalError if there is no signal at all, or if
        the selections or the sets of scalars differ.
        """
        if not signals:
            raise SignalError("nothing to concatenate", expected="at least one signal")
        signals = [signal for signal in signals if len(signal)] or signals[:1]
        together = _neighbours(signals)
        if together is not None:
            return together
        first = signals[0]
        for other in signals[1:]:
            if (other.selection, set(other.scalars)) != (first.selection, set(first.scalars)):
                raise SignalError(
                    "signals of different kinds cannot be concatenated",
                    expected=(first.selection, sorted(first.scalars)),
                    got=(other.selection, sorted(other.scalars)),
                )
        offsets = np.cumsum([0, *(signal.num_entries for signal in signals)])
        pairs = zip(signals, offsets, strict=False)
        indptr = [signal.indptr[:-1] + offset for signal, offset in pairs]
        return SparseSignal(
            first.selection,
            np.concatenate([*indptr, offsets[-1:]]),
            np.concatenate([s.ids_N for s in signals]),
            np.concatenate([s.logprobs_N for s in signals]),
            np.concatenate([s.rest_S for s in signals]),
            _concat_optional([s.counts_N for s in signals]),
            _concat_optional([s.tail_N for s in signals]),
            {name: np.concatenate([s.scalars[name] for s in signals]) for name in first.scalars},
        )


@dataclass(frozen=True, eq=False)
class TorchSignal:
    """A SparseSignal as torch tensors: what losses read.

    ``indptr`` int64 [S+1], ``token_ids_N`` int32, ``logprobs_N``, ``rest_S`` and each of
    ``scalars`` float32. ``ids_N`` and ``rows_N``, int64 as torch indexes by, are made on the device
    when they are first asked for: they are three quarters of what would be copied there.
    """

    selection: str
    indptr: torch.Tensor
    token_ids_N: torch.Tensor
    logprobs_N: torch.Tensor
    rest_S: torch.Tensor
    scalars: Mapping[str, torch.Tensor]

    @cached_property
    def ids_N(self) -> torch.Tensor:
        """int64 [N]: the token of each entry."""
        return self.token_ids_N.long()

    @cached_property
    def rows_N(self) -> torch.Tensor:
        """int64 [N]: the position each entry belongs to."""
        import torch

        rows = torch.arange(len(self), device=self.indptr.device)
        size = len(self.token_ids_N)
        return torch.repeat_interleave(rows, self.indptr.diff(), output_size=size)

    def __len__(self) -> int:
        return len(self.rest_S)

    def part(self, rows: slice, entries: slice) -> TorchSignal:
        """Positions that follow each other, and the entries they have: views, but for indptr."""
        return TorchSignal(
            self.selection,
            self.indptr[rows.start : rows.stop + 1] - entries.start,
            self.token_ids_N[entries],
            self.logprobs_N[entries],
            self.rest_S[rows],
            {name: values[rows] for name, values in self.scalars.items()},
        )

    def to(self, device: str | torch.device) -> TorchSignal:
        """The same signal on another device."""
        import torch

        waits = torch.device(device).type == "cpu"  # else the host may read before it is there
        return TorchSignal(
            self.selection,
            self.indptr.to(device, non_blocking=not waits),
            self.token_ids_N.to(device, non_blocking=not waits),
            self.logprobs_N.to(device, non_blocking=not waits),
            self.rest_S.to(device, non_blocking=not waits),
            {name: v.to(device, non_blocking=not waits) for name, v in self.scalars.items()},
        )


def _neighbours(signals: Sequence[SparseSignal]) -> SparseSignal | None:
    """The part of one signal that these parts are, one after the other; None if they are not."""
    whole, first, at = vars(signals[0]).get("_whole", (None, 0, 0))
    for signal in signals[1:]:
        other, start, end = vars(signal).get("_whole", (None, 0, 0))
        if other is not whole or start != at:
            return None
        at = end
    return None if whole is None else whole[first:at]


def segment_sum(values_N: NDArray[Any], indptr: NDArray[np.int64]) -> NDArray[Any]:
    """Sum of each CSR segment; an empty segment sums to zero."""
    totals = np.concatenate([[0], np.cumsum(values_N)]) if _is_exact(values_N) else None
    if totals is not None:
        return np.asarray(totals[indptr[1:]] - totals[indptr[:-1]])
    sums = np.zeros(len(indptr) - 1, dtype=np.float64)
    full = np.flatnonzero(np.diff(indptr))
    if len(full):
        sums[full] = np.add.reduceat(values_N, indptr[full])
    return sums


def _is_exact(values: NDArray[Any]) -> bool:
    return bool(np.issubdtype(values.dtype, np.integer))


def _concat_optional(arrays: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if len(present) == len(arrays) else None


def _check_shapes(signal: SparseSignal) -> None:
    S, N = len(signal.indptr) - 1, len(signal.ids_N)
    if (
        S < 0
        or signal.indptr[0] != 0
        or signal.indptr[-1] != N
        or (np.diff(signal.indptr) < 0).any()
    ):
        raise SignalError(
            "indptr does not index the entries",
            expected=f"ascending from 0 to {N}",
            got=signal.indptr[[0, -1]].tolist() if S >= 0 else [],
        )
    wanted = {"logprobs_N": N, "rest_S": S, "counts_N": N, "tail_N": N}
    arrays = {name: getattr(signal, name) for name in wanted}
    arrays |= signal.scalars
    for name, array in arrays.items():
        if array is not None and len(array) != wanted.get(name, S):
            raise SignalError(
                f"{name} has the wrong length", expected=wanted.get(name, S), got=len(array)
            )
