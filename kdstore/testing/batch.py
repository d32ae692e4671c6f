"""The smallest batch there is, for examples and for tests of losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdstore.readers.collate import Batch, Collator
from kdstore.sample import Sample
from kdstore.signal import SparseSignal


def one_position(probabilities: Sequence[float], *, label: int = 0, **scalars: float) -> Batch:
    """A batch of one scored position, with the teacher's ``probabilities`` of ids from 0 on.

    The first row of logits answers it, and ``label`` is its token.

    >>> one_position([0.75, 0.25], label=1).labels.tolist()
    [[-100, 1]]
    """
    size = len(probabilities)
    signal = SparseSignal.from_arrays(
        "full",
        [0, size],
        range(size),
        np.log(probabilities),
        scalars={name: [value] for name, value in scalars.items()},
    )
    sample = Sample("one", np.array([0, label], dtype=np.int32), runs=((1, 2),), signal=signal)
    return Collator()([sample])
