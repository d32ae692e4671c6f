"""Codec of full: every log-probability as a float16, in token-id order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.ids import check_ids
from kdstore.codecs.planes import FreshMemory, Plane, Planes, byte_names, decode_bytes, encode_bytes
from kdstore.errors import CorruptShardError
from kdstore.signal import SparseSignal, segment_sum

_LOWEST = -65504.0


class FullCodec(SignalCodec):
    """Planes ``half/0`` and ``half/1``: V values a position, -inf for a token without an entry.

    Decoding normalises, so that the entries sum to one.
    """

    name = "full/1"

    @property
    def entry_planes(self) -> tuple[str, ...]:
        """Names of the planes."""
        return byte_names("half", 2)

    def encode_entries(self, signal: SparseSignal, positions: Positions) -> dict[str, Plane]:
        """float16 to the nearest; below its range the lowest finite value."""
        V = self.order.vocab_size
        check_ids(signal.ids_N, V)
        dense = np.full((len(signal), V), -np.inf, dtype="<f2")
        dense[signal.rows_N, signal.ids_N] = np.clip(signal.logprobs_N, _LOWEST, 0)
        return encode_bytes("half", dense.reshape(-1), positions.splits * V)

    def decode_entries(
        self, planes: Planes, previous_S: NDArray[np.int32], memory: FreshMemory
    ) -> SparseSignal:
        """Entries of all tokens that have one."""
        S, V = len(previous_S), self.order.vocab_size
        halves = decode_bytes(planes, "half", dtype="<f2", length=S * V)
        dense = halves.astype(np.float32).reshape(S, V)
        if np.isnan(dense).any() or (dense > 0).any():
            raise CorruptShardError("a decoded entry is no log-probability", expected="at most 0")
        rows, ids = (dense > -np.inf).nonzero()
        indptr = np.searchsorted(rows, np.arange(S + 1))
        logprobs = dense[rows, ids].astype(np.float64)
        total = np.log(segment_sum(np.exp(logprobs), indptr))
        if not np.isfinite(total).all():
            raise CorruptShardError("a position has no entry", expected="entries that sum to one")
        return SparseSignal.from_arrays(self.selection, indptr, ids, logprobs - total[rows])
