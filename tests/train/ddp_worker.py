"""What each rank of the distributed tests runs; rank 0 writes what they end with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kdstore
from kdstore.errors import TrainingError
from kdstore.train.config import TeacherConfig
from kdstore.train.online import OnlineSamples
from tests.train.stores import store_trainer
from tests.train.test_finite import poisoned
from tests.train.train_helpers import make_trainer, parameters_of, ragged_samples, tiny_model

SPLITS = ((4, 1), (1, 4))
LAYOUTS: dict[str, dict[str, Any]] = {"padded": {}, "packed": {"pack": True, "max_length": 16}}


def main(folder: Path) -> None:
    """Train in all the ways that one process is compared with."""
    found = {"list": train_on_a_list(folder)}
    for name, loader in LAYOUTS.items():
        for batch_size, accumulation in SPLITS:
            found[f"{name} {batch_size}"] = train_on_a_store(
                folder,
                loader=loader,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
            )
    found["resumed"] = train_on_a_store(
        folder, resume=str(folder / "one" / "checkpoint-3"), per_device_train_batch_size=4
    )
    found["online"] = train_online(
        folder, folder / "two", ddp_backend="gloo", per_device_train_batch_size=8
    )
    found["diverged"] = diverge(folder)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else gloo's threads may abort the exit


def train_on_a_list(folder: Path) -> dict[str, Any]:
    """On half of each batch per rank, then evaluated."""
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
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"parameters": parameters_of(model), "logs": logs, "metrics": metrics}


def train_on_a_store(folder: Path, *, resume: str | None = None, **options: Any) -> dict[str, Any]:
    """Two epochs, of which the last step has fillers."""
    trainer = store_trainer(
        tiny_model(),
        kdstore.open(folder / "store"),
        folder / "two",
        num_train_epochs=2,
        lr_scheduler_type="linear",
        ddp_backend="gloo",
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    return {"parameters": parameters_of(trainer.model), "rates": rates}


def train_online(folder: Path, out: Path, **options: Any) -> torch.Tensor:
    """Two epochs, of which the first records what the teacher says; the weights then."""
    config = TeacherConfig(
        path=str(folder / "teacher"),
        data=str(folder / "texts.jsonl"),
        record=str(out / "record"),
        unit_tokens=500,
    )
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.path))
    data = OnlineSamples(config, quiet=True)
    loader = {"streams": 2, "shards_at_once": 1}
    store_trainer(student, data, out, loader=loader, num_train_epochs=2, **options).train()
    data.refresh()
    assert data.is_complete
    return parameters_of(student)


def diverge(folder: Path) -> list[Any]:
    """What each rank says of a loss that is not finite on one of them."""
    trainer = make_trainer(
        tiny_model(),
        poisoned(8, 3),
        folder,
        per_device_train_batch_size=1,
        max_steps=2,
        ddp_backend="gloo",
        train_sampling_strategy="sequential",
    )
    said: list[Any] = [None, None]
    try:
        trainer.train()
    except TrainingError as error:
        torch.distributed.all_gather_object(said, str(error))
    return said


if __name__ == "__main__":
    main(Path(sys.argv[1]))
