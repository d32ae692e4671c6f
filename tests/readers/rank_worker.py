"""What each rank of the distributed loader test runs: two ways of reading, and what came."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration

import kdstore


def main(url: str, folder: Path) -> None:
    """One epoch of a loader that asks torch.distributed, one that accelerate deals out."""
    store = kdstore.open(url)
    deals = DataLoaderConfiguration(even_batches=False)
    accelerator = Accelerator(cpu=True, dataloader_config=deals)
    loader = store.loader(batch_size=7, seed=4, num_workers=1)
    own = [[] if batch.is_filler else batch.sample_ids for batch in loader]
    sampler = kdstore.BatchSampler(store, batch_size=7, seed=4, rank=0, world_size=1)
    prepared = accelerator.prepare(
        torch.utils.data.DataLoader(
            kdstore.BatchDataset(store),
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=kdstore.Collator(),
        )
    )
    dealt = [batch.sample_ids for batch in prepared]
    found = {"ranks": [loader.rank, loader.world_size], "own": own, "dealt": dealt}
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()  # ends the process group too


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
