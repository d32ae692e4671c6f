"""Codec of full: every log-probability as a float16, in token-id order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import SignalCodec
from kdstore.codecs.planes import Plane, Planes, expect_length, join_integers, split_integers
from kdstore.errors import CorruptShardError
from kdstore.hashing import RowKeys
from kdstore.signal import SparseSignal, segment_sum

_LOWEST = -65504.0


class FullCodec(SignalCodec):
    """Planes ``half0`` and ``half1``: V values a position, -inf for a token without an entry.

    Decoding normalises, so that the entries sum to one.
    """

    name = "full/1"

    @property
    def entry_planes(self) -> tuple[str, ...]:
        """Names of the planes."""
        return ("half0", "half1")

    def encode_entries(
        self, signal: SparseSignal, keys: RowKeys, splits: NDArray[np.int64]
    ) -> dict[str, Plane]:
        """float16 to the nearest; below its range the lowest finite value."""
        del keys
        V = self.order.vocab_size
        dense = np.full((len(signal), V), -np.inf, dtype="<f2")
        dense[signal.rows_N, signal.ids_N] = np.clip(signal.logprobs_N, _LOWEST, 0)
        bits = dense.reshape(-1).view("<u2").astype(np.int64)
        return split_integers("half", bits, width=2, splits=splits * V)

    def decode_entries(self, planes: Planes, num_scored: int) -> SparseSignal:
        """Entries of all tokens that have one."""
        V = self.order.vocab_size
        bits = join_integers(planes, "half", width=2).astype(np.uint16)
        expect_length("half", bits, num_scored * V)
        dense = bits.view(np.float16).astype(np.float64).reshape(num_scored, V)
        if np.isnan(dense).any() or (dense > 0).any():
            raise CorruptShardError("a decoded entry is no log-probability", expected="at most 0")
        rows, ids = (dense > -np.inf).nonzero()
        indptr = np.searchsorted(rows, np.arange(num_scored + 1))
        total = np.log(segment_sum(np.exp(dense[rows, ids]), indptr))
        return SparseSignal.from_arrays(self.selection, indptr, ids, dense[rows, ids] - total[rows])
