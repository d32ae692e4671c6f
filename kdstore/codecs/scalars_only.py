"""The codec of scalars alone: what an overlay adds to positions whose entries are stored."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kdstore.codecs.base import Positions, SignalCodec
from kdstore.codecs.planes import FreshMemory, Plane, Planes
from kdstore.codecs.scalars import encode_scalars
from kdstore.signal import SparseSignal


class ScalarsCodec(SignalCodec):
    """Scalars in planes of their own. Not a codec of a store's signal: it holds no entries."""

    name: ClassVar[str] = "scalars/1"

    @property
    def entry_planes(self) -> tuple[str, ...]:
        """None."""
        return ()

    def encode(self, signal: SparseSignal, positions: Positions) -> dict[str, Plane]:
        """Planes of the scalars of B samples; whatever entries there are is left out."""
        values = {name: signal.scalars[name] for name in self.scalars}
        return encode_scalars(values, positions.keys, positions.splits)

    def encode_entries(self, signal: SparseSignal, positions: Positions) -> dict[str, Plane]:
        """No planes."""
        return {}

    def decode_entries(
        self, planes: Planes, previous_S: NDArray[np.int32], memory: FreshMemory
    ) -> SparseSignal:
        """A signal of S positions without an entry."""
        return SparseSignal.from_arrays(self.selection, np.zeros(len(previous_S) + 1), [], [])
