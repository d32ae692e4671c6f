"""What every peer stores of a sample, and how its samples become a packed batch.

A sample is a dict of flat arrays: ``input_ids`` int32 [T], ``runs`` int32 [2 R] (scored positions
as start and end), ``counts`` uint16 [S] (entries of each position), ``ids`` int32 [N], ``logprobs``
float16 [N], and each scalar, float32 [S]. A batch is what ``kdstore.readers.collate.Batch`` holds,
as a dict of tensors. This module runs in environments that do not have kdstore.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Tensors = dict[str, torch.Tensor]
PER_TOKEN, PER_RUN, PER_POSITION, PER_ENTRY = "T", "R", "S", "N"
IGNORED_LABEL = -100


class Payload:
    """The arrays of all samples, end to end in a folder of .npy files."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "payload.json").read_text())
        self.axes: dict[str, str] = about["axes"]
        self.batch_tokens: int = about["batch_tokens"]
        self._columns: Arrays = {name: np.load(folder / f"{name}.npy") for name in self.axes}
        axes = sorted(set(self.axes.values()))
        self._splits: dict[str, NDArray[Any]] = {
            axis: np.load(folder / f"splits_{axis}.npy") for axis in axes
        }

    def __len__(self) -> int:
        return len(self._splits[PER_TOKEN]) - 1

    def __getitem__(self, index: int) -> Arrays:
        """The arrays of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: flat[slice(*self._bounds(name, index))] for name, flat in self.items()}

    def __iter__(self) -> Iterator[Arrays]:
        return (self[index] for index in range(len(self)))

    def items(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """(name, array of all samples)."""
        return iter(self._columns.items())

    def splits(self, name: str) -> NDArray[Any]:
        """int64 [B + 1]: where each sample begins in a column."""
        return self._splits[self.axes[name]]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self._splits[PER_TOKEN][-1])

    @property
    def batch_size(self) -> int:
        """Samples that have ``batch_tokens`` tokens on average."""
        return max(1, round(self.batch_tokens * len(self) / self.num_tokens))

    def _bounds(self, name: str, index: int) -> list[int]:
        bounds: list[int] = self.splits(name)[index : index + 2].tolist()
        return bounds


def collate(samples: Sequence[Arrays]) -> Tensors:
    """A packed batch of samples."""
    flat = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    lengths = np.array([len(sample["input_ids"]) for sample in samples])
    runs = np.array([len(sample["runs"]) // 2 for sample in samples])
    return packed(flat, lengths, runs)


def packed(flat: Arrays, lengths_B: NDArray[np.int64], runs_B: NDArray[np.int64]) -> Tensors:
    """A packed batch of samples whose arrays are end to end already."""
    ends = np.cumsum(lengths_B)
    starts = ends - lengths_B
    input_ids = torch.from_numpy(flat["input_ids"]).long()
    first = np.repeat(starts, lengths_B)
    token_rows = torch.from_numpy(_positions(flat["runs"], np.repeat(starts, runs_B)))
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    labels[token_rows] = input_ids[token_rows]
    counts = torch.from_numpy(flat["counts"].astype(np.int64))
    indptr = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=indptr[1:])
    known = ("input_ids", "runs", "counts", "ids", "logprobs")
    return {
        "input_ids": input_ids[None],
        "position_ids": torch.from_numpy(np.arange(len(first)) - first)[None],
        "cu_seqlens": torch.from_numpy(np.append(0, ends).astype(np.int32)),
        "labels": labels[None],
        "logit_rows": token_rows - 1,
        "indptr": indptr,
        "ids": torch.from_numpy(flat["ids"]),
        "logprobs": torch.from_numpy(flat["logprobs"]).float(),
        **{name: torch.from_numpy(flat[name]) for name in flat if name not in known},
    }


def _positions(runs: NDArray[Any], offsets_R: NDArray[Any]) -> NDArray[Any]:
    """int64 [S]: where the tokens of all runs are in the row of all tokens."""
    first, last = runs.reshape(-1, 2).astype(np.int64).T + offsets_R
    lengths = last - first
    ends = np.cumsum(lengths)
    return np.asarray(np.repeat(first - ends + lengths, lengths) + np.arange(ends[-1]))


def content(batch: Tensors) -> dict[str, float]:
    """Sums over a batch, by which sides are compared."""
    return {
        "tokens": batch["input_ids"].numel(),
        "input_ids": int(batch["input_ids"].sum()),
        "position_ids": int(batch["position_ids"].sum()),
        "samples": len(batch["cu_seqlens"]) - 1,
        "positions": len(batch["logit_rows"]),
        "labels": int(batch["labels"].sum()),
        "entries": len(batch["ids"]),
        "indptr": int(batch["indptr"][-1]),
        "ids": int(batch["ids"].sum()),
        "logprobs": float(batch["logprobs"].double().sum()),
    }
