"""The contract of a signal codec.

A codec turns the signals of B samples into named byte planes and back, all samples at once and
without per-position Python. It owns every rounding: given the same signal and keys it writes the
same bytes in any batch. What it reads may be hostile: planes that contradict each other raise
CorruptShardError, and nothing is allocated beyond what the planes' own lengths justify.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.jit import kernel, u
from kdstore.codecs.order import IdOrder
from kdstore.codecs.planes import FreshMemory, Memory, Plane, Planes
from kdstore.codecs.scalars import decode_scalars, encode_scalars, scalar_planes
from kdstore.errors import SignalError
from kdstore.hashing import RowKeys
from kdstore.signal import SparseSignal

SUM_TOLERANCE = 1e-3  # of what a teacher may miss a sum of one by; decoding gives it exactly
_BAD = {
    1: ("the entries of a position are not in order", "token ids ascending, none twice"),
    2: ("an entry is no log-probability", "values at most 0, no NaN"),
    3: ("entries and rest of a position do not sum to one", f"1 within {SUM_TOLERANCE}"),
}


@dataclass(frozen=True, eq=False)
class Positions:
    """The S positions of B samples that a signal answers, one sample after the other.

    * ``keys``: what their random numbers are made of
    * ``splits`` int64 [B+1]: sample b owns positions ``splits[b]:splits[b + 1]``
    * ``previous_S`` int32: the token before each position, which the id order goes by
    """

    keys: RowKeys
    splits: NDArray[np.int64]
    previous_S: NDArray[np.int32]


class SignalCodec(ABC):
    """Signals of one selection, over one id order, as byte planes."""

    name: ClassVar[str]

    def __init__(self, selection: str, *, order: IdOrder, scalars: Sequence[str]) -> None:
        self.selection = selection
        self.order = order
        self.scalars = tuple(scalars)

    @property
    def planes(self) -> tuple[str, ...]:
        """Names of all planes of this codec."""
        return (*self.entry_planes, *scalar_planes(self.scalars))

    def encode(self, signal: SparseSignal, positions: Positions) -> dict[str, Plane]:
        """Planes of B samples.

        Raises SignalError if the signal is not one of this codec's selection and scalars.
        """
        self._check(signal)
        scalars = {name: signal.scalars[name] for name in self.scalars}
        return {
            **self.encode_entries(signal, positions),
            **encode_scalars(scalars, positions.keys, positions.splits),
        }

    def decode(
        self, planes: Planes, previous_S: NDArray[np.int32], *, memory: Memory | None = None
    ) -> SparseSignal:
        """The signal of the S positions that the planes hold, entries ascending by id.

        Entries lie in ``memory``, if it is given, and are valid until it is used again.
        Raises CorruptShardError if the planes contradict each other.
        """
        signal = self.decode_entries(planes, previous_S, memory or FreshMemory())
        return replace(signal, scalars=decode_scalars(planes, self.scalars, len(previous_S)))

    @property
    @abstractmethod
    def entry_planes(self) -> tuple[str, ...]:
        """Names of the planes that hold entries and rest."""

    def compression_level(self, plane: str) -> int:
        """zstd level of a plane: 1, since repeats are rare and literals compress as well."""
        del plane
        return 1

    @abstractmethod
    def encode_entries(self, signal: SparseSignal, positions: Positions) -> dict[str, Plane]:
        """Planes of entries and rest."""

    @abstractmethod
    def decode_entries(
        self, planes: Planes, previous_S: NDArray[np.int32], memory: FreshMemory
    ) -> SparseSignal:
        """The signal without its scalars."""

    def _check(self, signal: SparseSignal) -> None:
        missing = [name for name in self.scalars if name not in signal.scalars]
        if signal.selection != self.selection or missing:
            raise SignalError(
                "the signal is not of the kind that this codec writes",
                expected=f"{self.selection} with scalars {list(self.scalars)}",
                got=f"{signal.selection} with scalars {sorted(signal.scalars)}",
            )
        bad, row = _check_entries(
            signal.indptr, signal.ids_N, signal.logprobs_N, signal.rest_S, SUM_TOLERANCE
        )
        if bad:
            what, expected = _BAD[bad]
            entries = slice(*signal.indptr[row : row + 2])
            raise SignalError(
                what,
                where=f"position {row} of the signal",
                expected=expected,
                got=f"ids {signal.ids_N[entries][:8].tolist()}, log-probabilities "
                f"{signal.logprobs_N[entries][:8].tolist()}, rest {signal.rest_S[row]}",
            )


@kernel
def _check_entries(
    indptr: NDArray[Any],
    ids_N: NDArray[Any],
    logprobs_N: NDArray[Any],
    rest_S: NDArray[Any],
    tolerance: float,
) -> tuple[int, int]:
    """Status (0: fine, else see ``_BAD``) and position."""
    for s in range(len(rest_S)):
        total, last = np.exp(np.float64(rest_S[s])), np.int64(-(1 << 40))
        for i in range(indptr[s], indptr[s + 1]):
            if ids_N[u(i)] <= last:
                return 1, s
            last = np.int64(ids_N[u(i)])
            if not logprobs_N[u(i)] <= tolerance:
                return 2, s
            total += np.exp(np.float64(logprobs_N[u(i)]))
        if not abs(total - 1) <= tolerance:
            return 3, s
    return 0, 0
