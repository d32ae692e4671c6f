"""What a process of the kill test runs: a training run that says where it is, begun or resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

import kdstore
from kdstore.train.checkpoint import last_checkpoint
from tests.train.stores import dropout_model, store_trainer


class Reports(TrainerCallback):
    """Sends the number of each step, before its checkpoint is written."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def on_step_end(self, args, state, control, **kwargs):
        self.pipe.send(state.global_step)


def train(store: Path, folder: Path, workers: int, options: dict[str, Any], pipe: Any) -> None:
    """Go on from the last complete checkpoint in the folder, or begin if there is none."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    resume = last_checkpoint(folder) is not None
    trainer = store_trainer(
        dropout_model(seed=int(resume)),  # the weights must come from the checkpoint
        kdstore.open(store),
        folder,
        optim="adamw_torch",
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        dataloader_num_workers=workers,
        dataloader_multiprocessing_context="fork" if workers else None,
        callbacks=[Reports(pipe)],
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
