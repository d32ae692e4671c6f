"""DistillKit's layout, read as DistillKit reads it: lists of lists of bytes, a tensor of each row.

Its trainer loads the Parquet file with Hugging Face datasets and makes tensors of Python lists by
``torch.tensor(row[column])``; then all rows are unpacked together. ``benchmarks.distillkit_layout``
describes the cells. It has no scalars, and its values are those of a fit.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.peers.arrays import Payload, Tensors, packed
from benchmarks.peers.serve import Batches, serve

K, BITS = 50, 18
_FIRST_BIT = torch.arange(K) * BITS
_J = torch.arange(1, K, dtype=torch.float32)
_PLACES = torch.stack([torch.ones(K - 1), _J, _J.sqrt()])


class DistillKit:
    """A Parquet file that ``benchmarks.load_payload`` wrote."""

    version = f"layout of 1.0, datasets {version('datasets')}"

    def __init__(self, payload: Path, folder: Path) -> None:
        file = payload / "distillkit.parquet"
        self.bytes_on_disk = file.stat().st_size
        self._dataset = Dataset.from_parquet(str(file), cache_dir=str(folder))
        self._batch_size = Payload(payload).batch_size

    def epochs(self, *, workers: int, count: int) -> Batches:
        """Batches of about ``batch_tokens`` tokens."""
        loader: DataLoader[Tensors] = DataLoader(
            self._dataset,
            batch_size=self._batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
        )
        for _ in range(count):
            yield from loader
            yield None


def _collate(rows: list[dict[str, Any]]) -> Tensors:
    ids = _unpacked(_rows(rows, "bytepacked_indices", torch.uint8))
    logprobs = _fitted(_rows(rows, "compressed_logprobs", torch.uint8))
    lengths = np.array([len(row["input_ids"]) for row in rows])
    flat = {
        "input_ids": _rows(rows, "input_ids", torch.int64).numpy(),
        "runs": np.stack([np.ones_like(lengths), lengths], axis=1).reshape(-1),
        "counts": np.full(len(ids), K),
        "ids": ids.reshape(-1).numpy(),
        "logprobs": logprobs.reshape(-1).numpy(),
    }
    return packed(flat, lengths, np.ones_like(lengths))


def _rows(rows: list[dict[str, Any]], column: str, dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.tensor(row[column], dtype=dtype) for row in rows])


def _unpacked(packed_SB: Tensor) -> Tensor:
    """int64 [S, 50]: ids of 18 bits, low bits first; none spans more than three bytes."""
    wide = packed_SB.long()
    first, shift = _FIRST_BIT // 8, _FIRST_BIT % 8
    three = wide[:, first] | wide[:, first + 1] << 8 | wide[:, first + 2] << 16
    return three >> shift & (1 << BITS) - 1


def _fitted(cells_SB: Tensor) -> Tensor:
    """float32 [S, 50]: the exact value, and those of the fit."""
    exact = cells_SB[:, :2].contiguous().view(torch.bfloat16).float()
    return torch.cat([exact, cells_SB[:, 2:].contiguous().view(torch.float32) @ _PLACES], dim=1)


if __name__ == "__main__":
    serve(DistillKit)
