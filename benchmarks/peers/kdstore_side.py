"""kdstore itself, asked as its peers are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import kdstore
from benchmarks.peers.arrays import Tensors
from benchmarks.peers.serve import Batches, folder_bytes, serve
from kdstore.readers.collate import Batch


class KDStore:
    """The store that the payload was read from."""

    version = kdstore.__version__

    def __init__(self, payload: Path, folder: Path) -> None:
        del folder
        about = json.loads((payload / "payload.json").read_text())
        self._batch_tokens: int = about["batch_tokens"]
        self._store = kdstore.open(about["store"])
        self.bytes_on_disk = folder_bytes(Path(about["store"]))

    def epochs(self, *, workers: int, count: int) -> Batches:
        """Batches of at most ``batch_tokens`` tokens."""
        return self.epochs_of(batch_tokens=self._batch_tokens, workers=workers, count=count)

    def epochs_of(self, *, batch_tokens: int, workers: int = 0, count: int = 1) -> Batches:
        """The same, with batches of another size. An epoch ends when every sample has come."""
        seen = 0
        for batch in load(self._store, batch_tokens=batch_tokens, workers=workers, epochs=count):
            yield _tensors(batch)
            seen += len(batch.sample_ids)
            if seen == len(self._store):
                seen = 0
                yield None


def load(store: kdstore.Store, *, batch_tokens: int, workers: int, epochs: int) -> Iterator[Batch]:
    """Packed batches of several epochs."""
    options = {"num_workers": workers} if workers else {}
    return iter(
        store.loader(batch_tokens=batch_tokens, pack=True, seed=0, epochs=epochs, **options)
    )


def _tensors(batch: Batch) -> Tensors:
    signal = batch.signal
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "labels": batch.labels,
        "logit_rows": batch.logit_rows_S,
        "indptr": signal.indptr,
        "rows": signal.rows_N,
        "ids": signal.ids_N,
        "logprobs": signal.logprobs_N,
        "rest": signal.rest_S,
        **signal.scalars,
    }


if __name__ == "__main__":
    serve(KDStore)
