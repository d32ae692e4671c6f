"""A run of one step that leaves nothing behind: does it fit, and what will it do."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from kdstore.sample import Sample
from kdstore.train.config import TeacherConfig, TrainConfig
from kdstore.train.prepare import make_trainer, prepare
from kdstore.train.sources import describe_data
from kdstore.train.trainable import count_parameters
from kdstore.train.trainer import DistillTrainer
from kdstore.train.watch import TokenMeter

# What a run does beside its steps: saving, evaluating at intervals, reporting.
_NOTHING_ELSE = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "logging_strategy": "steps",
    "logging_steps": 1,
}


def dry_run(config: TrainConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Load everything, take one step of the run and evaluate one batch; nothing is written.

    What it would be trained on and by how many ``steps_planned``; ``parameters`` and
    ``parameters_trained``; of the step the ``batch_shapes`` [rows, tokens] (one for each
    accumulated batch) and ``losses``, ``step_seconds`` and ``tokens_per_second`` (a first step is
    slower than those that follow), and ``peak_memory_bytes`` of the device, else of the process.
    With `eval`, ``eval_loss`` of its longest samples. Raises what ``run_training`` raises.
    """
    with TemporaryDirectory(prefix="kdstore-dry-run-") as folder:
        training = {**config.training, **_NOTHING_ELSE, "output_dir": folder}
        config = replace(config, training=training, teacher=_unrecorded(config.teacher))
        prepared = prepare(config, quiet=quiet)
        meter, step, shapes = TokenMeter(prepared.model), OneStep(), _shapes_of(prepared.model)
        trainer = make_trainer(config, prepared, callbacks=[step])
        total, trained = count_parameters(prepared.model)
        trainer.train()
        names = ("loss", *config.losses)
        figures = {
            **describe_data(prepared.data),
            "parameters": total,
            "parameters_trained": trained,
            "steps_planned": trainer.state.max_steps,
            "batch_shapes": shapes,
            "losses": {name: step.logs[name] for name in names if name in step.logs},
            "step_seconds": round(step.seconds, 3),
            "tokens_per_second": round(
                meter.tokens * trainer.args.world_size / max(step.seconds, 1e-9), 1
            ),
        }
        if prepared.held_out is not None:
            figures["eval_loss"] = _evaluate_one(trainer, prepared.held_out)["eval_loss"]
    return figures | _peak_memory(trainer.args.device)


def _unrecorded(teacher: TeacherConfig | None) -> TeacherConfig | None:
    return teacher and replace(teacher, record=None, audit_fraction=0.0)


class OneStep(TrainerCallback):  # type: ignore[misc]
    """Ends training after a step; its ``seconds`` and what was logged of it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.logs: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        self._began_s = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time when the device is done, and stop."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.seconds = time.monotonic() - self._began_s
        control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the figures."""
        self.logs |= kwargs["logs"]


def _shapes_of(model: nn.Module) -> list[list[int]]:
    """A list that will have [rows, tokens] of each batch that the model is trained on."""
    shapes: list[list[int]] = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            shapes.append(list(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(see, with_kwargs=True)
    return shapes


def _evaluate_one(trainer: DistillTrainer, held_out: list[Sample]) -> dict[str, float]:
    """Figures of a batch of the longest held-out samples: those that take most memory."""
    scored = [sample for sample in held_out if sample.num_scored]
    longest = sorted(scored, key=lambda sample: -sample.num_tokens)
    return trainer.evaluate(longest[: trainer.args.per_device_eval_batch_size])


def _peak_memory(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        return {"peak_memory_bytes": peak, "peak_memory_of": str(device)}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024  # Linux counts in kibibytes
    return {"peak_memory_bytes": resident * scale, "peak_memory_of": "process"}
