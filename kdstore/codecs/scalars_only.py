"""The codec of scalars alone: what an overlay adds to positions whose entries are stored."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import SignalCodec
from kdstore.codecs.planes import Plane, Planes
from kdstore.codecs.scalars import encode_scalars
from kdstore.hashing import RowKeys
from kdstore.signal import SparseSignal


class ScalarsCodec(SignalCodec):
    """Scalars in planes of their own. Not a codec of a store's signal: it holds no entries."""

    name: ClassVar[str] = "scalars/1"

    @property
    def entry_planes(self) -> tuple[str, ...]:
        """None."""
        return ()

    def encode(
        self, signal: SparseSignal, keys: RowKeys, splits: NDArray[np.int64]
    ) -> dict[str, Plane]:
        """Planes of the scalars of B samples; whatever entries there are is left out."""
        values = {name: signal.scalars[name] for name in self.scalars}
        return encode_scalars(values, keys, splits)

    def encode_entries(
        self, signal: SparseSignal, keys: RowKeys, splits: NDArray[np.int64]
    ) -> dict[str, Plane]:
        """No planes."""
        return {}

    def decode_entries(self, planes: Planes, num_scored: int) -> SparseSignal:
        """A signal of ``num_scored`` positions without an entry."""
        return SparseSignal.from_arrays(self.selection, np.zeros(num_scored + 1), [], [])
