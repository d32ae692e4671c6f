"""What each rank of the GPU tests runs: three steps of DistillTrainer, plain or sharded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.train.train_helpers import make_trainer, ragged_samples, tiny_model

SHARDING: dict[str, dict[str, Any]] = {
    "plain": {},
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
    "zero3": {
        "deepspeed": {
            "zero_optimization": {"stage": 3},
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_allow_untested_optimizer": True,
        }
    },
}


def main(folder: Path, kind: str) -> None:
    """Train on this rank's share of eight samples a step; rank 0 writes the whole weights."""
    ranks = dist.get_world_size() if dist.is_initialized() else int(torch.cuda.device_count())
    model = tiny_model()
    trainer = make_trainer(
        model,
        ragged_samples(24),
        folder,
        losses={"forward_kl": 0.75, "ce": 0.25},
        use_cpu=False,
        per_device_train_batch_size=8 // ranks,
        max_steps=3,
        train_sampling_strategy="sequential",
        **SHARDING[kind],
    )
    trainer.train()
    trainer.save_model(str(folder / kind))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
