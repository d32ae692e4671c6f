"""A loader's samples: read by plan, cut, and reduced to the positions that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdstore.errors import UsageError
from kdstore.readers.batches import BatchPlan
from kdstore.sample import Sample

if TYPE_CHECKING:
    from kdstore.readers.mixture import Mixture
    from kdstore.readers.samples import Index, Samples


@dataclass(frozen=True)
class PositionFilter:
    """Which scored positions are trained on; the others stay as context.

    * ``kinds``: those in spans of these kinds, such as ``("assistant",)``
    * ``label_logprob``, ``entropy``: those whose scalar lies in ``[low, high]``, in nats
    """

    kinds: tuple[str, ...] | None = None
    label_logprob: tuple[float, float] | None = None
    entropy: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str):  # any part of a text is in it
            raise UsageError(
                "kinds of a PositionFilter are several names",
                expected=f"({self.kinds!r},)",
                got=repr(self.kinds),
            )

    def __call__(self, sample: Sample) -> Sample:
        """The sample at the positions that pass; UsageError if it lacks a scalar."""
        kept: NDArray[np.bool_] = np.ones(sample.num_scored, dtype=np.bool_)
        if self.kinds is not None:
            of_kind = np.zeros(sample.num_tokens, dtype=np.bool_)
            for span in sample.spans:
                of_kind[span.start : span.end] |= span.kind in self.kinds
            kept &= of_kind[sample.positions_S]
        for name in ("label_logprob", "entropy"):
            bounds = getattr(self, name)
            if bounds is not None:
                values = scalar_of(sample, name)
                kept &= (values >= bounds[0]) & (values <= bounds[1])
        return sample.at(kept)


class PlannedSamples(list[Sample]):
    """The samples of a batch, with the plan that they were read by."""

    def __init__(self, samples: Sequence[Sample], plan: BatchPlan) -> None:
        super().__init__(samples)
        self.plan = plan


class BatchDataset(torch.utils.data.Dataset[Sample]):
    """The samples of a store or mixture, map-style; a ``BatchPlan`` as indices gives its batch.

    The data set of a loader, for a torch DataLoader of your own: ``batch_sampler`` is a
    ``BatchSampler``, ``collate_fn`` a ``Collator``.
    """

    def __init__(self, data: Samples | Mixture, *, keep: PositionFilter | None = None) -> None:
        self.data, self._keep = data, keep

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Index) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Index] | BatchPlan) -> list[Sample]:
        """Several samples; of a plan, its pieces of samples, and the plan with them."""
        if isinstance(indices, BatchPlan) and len(indices.ahead):
            self.data.prefetch(indices.ahead)
        samples = self.data.__getitems__(indices)
        if not isinstance(indices, BatchPlan):
            return [self._kept(sample) for sample in samples]
        pairs = zip(samples, indices.pieces.tolist(), strict=True)
        cut = [_cut(sample, start, end) for sample, (_, start, end) in pairs]
        if indices.is_filler:
            return PlannedSamples([_unscored(sample) for sample in cut], indices)
        return PlannedSamples([self._kept(sample) for sample in cut], indices)

    def _kept(self, sample: Sample) -> Sample:
        return sample if self._keep is None else self._keep(sample)


def _cut(sample: Sample, start: int, end: int) -> Sample:
    return sample if (start, end) == (0, sample.num_tokens) else sample.part(start, end)


def _unscored(sample: Sample) -> Sample:
    return sample.at(np.zeros(sample.num_scored, dtype=np.bool_))


def scalar_of(sample: Sample, name: str) -> NDArray[Any]:
    """[S]: a scalar of a sample's signal; UsageError naming those that there are."""
    scalars = {} if sample.signal is None else sample.signal.scalars
    if name not in scalars:
        raise UsageError(
            f"positions cannot be told apart by {name}",
            where=f"sample {sample.sample_id!r}",
            expected="one of " + (", ".join(scalars) or "no scalars"),
            got=name,
        )
    return scalars[name]
