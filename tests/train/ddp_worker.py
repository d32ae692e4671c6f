"""What each rank of the distributed test runs: two steps, then the parameters and the logs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.train.train_helpers import make_trainer, parameters_of, ragged_samples, tiny_model


def main(folder: Path) -> None:
    """Train on half of each batch per rank; rank 0 writes what it ends with."""
    model = tiny_model()
    trainer = make_trainer(
        model,
        ragged_samples(16),
        folder,
        losses={"forward_kl": 0.75, "ce": 0.25},
        eval_dataset=ragged_samples(3, seed=5),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=2,
        ddp_backend="gloo",
        train_sampling_strategy="sequential",
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        found = {"parameters": parameters_of(model), "logs": logs, "metrics": metrics}
        torch.save(found, folder / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else gloo's threads may abort the exit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
