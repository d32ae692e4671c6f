"""Hugging Face datasets: an Arrow file, memory-mapped, gathered a batch at a time.

Batches are asked for as Arrow tables through a BatchSampler, as its manual advises for speed: the
samples of a batch come end to end, without a Python object each.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, load_from_disk
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from benchmarks.peers.arrays import Payload, Tensors, packed
from benchmarks.peers.serve import Batches, folder_bytes, serve

WRITTEN_TOGETHER = 256  # samples in a record batch


class Datasets:
    """A row a sample, a list column for each array."""

    version = version("datasets")

    def __init__(self, payload: Path, folder: Path) -> None:
        samples = Payload(payload)
        columns = {name: _lists(values, samples.splits(name)) for name, values in samples.items()}
        batches = pa.table(columns).to_batches(max_chunksize=WRITTEN_TOGETHER)
        Dataset(pa.Table.from_batches(batches)).save_to_disk(str(folder))
        self.bytes_on_disk = folder_bytes(folder)
        self.dataset = load_from_disk(str(folder)).with_format("arrow")
        self.batch_size = samples.batch_size

    def epochs(self, *, workers: int, count: int) -> Batches:
        """Batches of about ``batch_tokens`` tokens."""
        order = RandomSampler(self.dataset, generator=torch.Generator().manual_seed(0))
        loader: DataLoader[Tensors] = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=BatchSampler(order, self.batch_size, drop_last=False),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
        )
        for _ in range(count):
            yield from loader
            yield None


def _collate(table: pa.Table) -> Tensors:
    lists = {name: table[name].combine_chunks() for name in table.column_names}
    flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
    # Arrow's buffers are read-only, which torch warns of; what is not converted is copied.
    own = {
        name: values if values.flags.writeable else values.copy() for name, values in flat.items()
    }
    lengths = {name: lists[name].value_lengths().to_numpy() for name in ("input_ids", "runs")}
    return packed(own, lengths["input_ids"].astype(np.int64), lengths["runs"].astype(np.int64) // 2)


def _lists(values: NDArray[Any], splits: NDArray[np.int64]) -> pa.ListArray:
    return pa.LargeListArray.from_arrays(pa.array(splits), pa.array(values))


if __name__ == "__main__":
    serve(Datasets)
