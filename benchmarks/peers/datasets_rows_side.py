"""Hugging Face datasets as its manual begins: samples as arrays, and a collate function.

The same file as in ``datasets_side``, read in the way that is written most often.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from benchmarks.peers.arrays import Tensors, collate
from benchmarks.peers.datasets_side import Datasets
from benchmarks.peers.serve import Batches, serve


class DatasetsRows(Datasets):
    """A dict of numpy arrays a sample."""

    def epochs(self, *, workers: int, count: int) -> Batches:
        """Batches of about ``batch_tokens`` tokens."""
        loader: DataLoader[Tensors] = DataLoader(
            self.dataset.with_format("numpy"),
            batch_size=self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
        )
        for _ in range(count):
            yield from loader
            yield None


if __name__ == "__main__":
    serve(DatasetsRows)
