"""mosaicml-streaming: MDS shards of ndarrays, StreamingDataset and StreamingDataLoader."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# streaming imports torchvision for images, and torchvision, as PyPI has it, does not load beside a
# torch without CUDA: it registers shapes for two operators of a library that it failed to load.
_operators: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402

from benchmarks.peers.arrays import Payload, collate  # noqa: E402
from benchmarks.peers.serve import Batches, folder_bytes, serve  # noqa: E402


class Streaming:
    """Shards of 64 MB, uncompressed, as is their default."""

    version = version("mosaicml-streaming")

    def __init__(self, payload: Path, folder: Path) -> None:
        samples = Payload(payload)
        columns = {name: f"ndarray:{values.dtype.name}" for name, values in samples.items()}
        with MDSWriter(out=str(folder), columns=columns) as writer:
            for sample in samples:
                writer.write(sample)
        self.bytes_on_disk = folder_bytes(folder)
        self._batch_size, self._folder = samples.batch_size, folder
        self._datasets: dict[int, StreamingDataset] = {}
        clean_stale_shared_memory()

    def epochs(self, *, workers: int, count: int) -> Batches:
        """Batches of about ``batch_tokens`` tokens."""
        loader = StreamingDataLoader(
            self._dataset(workers),
            batch_size=self._batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
        )
        for _ in range(count):
            yield from loader
            yield None

    def _dataset(self, workers: int) -> StreamingDataset:
        """A dataset for each number of workers: one that served another waits for ever.

        Each needs a folder of its own, since streaming shares its state by the folder's name.
        """
        if workers not in self._datasets:
            link = self._folder.with_name(f"{self._folder.name}-{workers}")
            link.mkdir()
            for file in self._folder.iterdir():
                (link / file.name).symlink_to(file)
            self._datasets[workers] = StreamingDataset(
                local=str(link), shuffle=True, batch_size=self._batch_size, shuffle_seed=0
            )
        return self._datasets[workers]


if __name__ == "__main__":
    serve(Streaming)
