"""mosaicml-streaming: MDS shards of ndarrays, StreamingDataset and StreamingDataLoader."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from benchmarks.peers.arrays import Payload, collate
from benchmarks.peers.serve import Batches, folder_bytes, serve


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
        self._batch_size = samples.batch_size
        clean_stale_shared_memory()
        self._dataset = StreamingDataset(
            local=str(folder), shuffle=True, batch_size=self._batch_size, shuffle_seed=0
        )

    def epochs(self, *, workers: int, count: int) -> Batches:
        """Batches of about ``batch_tokens`` tokens."""
        loader = StreamingDataLoader(
            self._dataset,
            batch_size=self._batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
        )
        for _ in range(count):
            yield from loader
            yield None


if __name__ == "__main__":
    serve(Streaming)
