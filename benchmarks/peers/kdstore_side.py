"""kdstore itself, asked as its peers are."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

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
        """Batches of at most ``batch_tokens`` tokens. An epoch ends when every sample has come."""
        seen = 0
        loader = self._store.loader(
            batch_tokens=self._batch_tokens, pack=True, seed=0, epochs=count, num_workers=workers
        )
        for batch in loader:
            yield _tensors(batch)
            seen += len(batch.sample_ids)
            if seen == len(self._store):
                seen = 0
                yield None

    def fill(self, max_length: int) -> float:
        """Tokens of an epoch over what its packs have room for, the last ones included."""
        sampler = kdstore.BatchSampler(
            self._store, batch_tokens=self._batch_tokens, pack=True, max_length=max_length
        )
        packs = sum(len(plan.packs) for plan in sampler)
        return int(self._store.shard_tokens.sum()) / (packs * max_length)

    def bare(self, rounds: int) -> dict[str, float]:
        """Tokens, and seconds of reading all row groups and of decoding each in one call."""
        for _ in range(rounds):
            seconds = {"read": 0.0, "decode": 0.0}  # of the last round: the others warm up
            for index in range(self._store.num_shards):
                shard = self._store.shard(index)
                for group in range(shard.num_row_groups):
                    start = time.perf_counter()
                    rows = shard.row_group(group)
                    seconds["read"] += time.perf_counter() - start
                    places = range(len(rows))
                    previous = [s.previous_S for s in shard.samples(rows, group, places)]
                    planes = self._store.decoder.planes(rows.take(places))
                    start = time.perf_counter()
                    self._store.decoder.codec.decode(planes, np.concatenate(previous))
                    seconds["decode"] += time.perf_counter() - start
        return {"tokens": int(self._store.shard_tokens.sum()), **seconds}


def _tensors(batch: Batch) -> Tensors:
    signal = batch.signal
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "labels": batch.labels,
        "logit_rows": batch.logit_rows_S,
        "indptr": signal.indptr,
        "ids": signal.token_ids_N,
        "logprobs": signal.logprobs_N,
        "rest": signal.rest_S,
        **signal.scalars,
    }


if __name__ == "__main__":
    serve(KDStore)
