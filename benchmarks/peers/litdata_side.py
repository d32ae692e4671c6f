"""litdata: optimized chunks of arrays, StreamingDataset and StreamingDataLoader."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path

import litdata

from benchmarks.peers.arrays import Arrays, Payload, collate
from benchmarks.peers.serve import Batches, folder_bytes, serve


class LitData:
    """Chunks of 64 MB, uncompressed.

    Items are decoded one by one: of windows of 256, the default, few samples of top-50 signals stay
    in its cache, and shuffled reading was ten times as slow.
    """

    version = version("litdata")

    def __init__(self, payload: Path, folder: Path) -> None:
        samples = Payload(payload)
        litdata.optimize(
            fn=partial(_sample, samples),
            inputs=list(range(len(samples))),
            output_dir=str(folder),
            chunk_bytes="64MB",
            num_workers=1,
            verbose=False,
        )
        self.bytes_on_disk = folder_bytes(folder)
        self._batch_size, self._folder = samples.batch_size, folder

    def epochs(self, *, workers: int, count: int) -> Batches:
        """Batches of about ``batch_tokens`` tokens."""
        loader = litdata.StreamingDataLoader(
            litdata.StreamingDataset(
                str(self._folder), shuffle=True, drop_last=False, seed=0, batch_decode=0
            ),
            batch_size=self._batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
        )
        for _ in range(count):
            yield from loader
            yield None


def _sample(samples: Payload, index: int) -> Arrays:
    return samples[index]


if __name__ == "__main__":
    serve(LitData)
