"""One training run from its configuration: what `kdstore train` does."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

import kdstore
from kdstore.errors import UsageError
from kdstore.inputs import InputConfig, SampleBuilder, open_source
from kdstore.sample import Sample
from kdstore.train.config import EvalConfig, TrainConfig
from kdstore.train.student import build_student, check_vocabulary, load_tokenizer
from kdstore.train.trainer import DistillTrainer

if TYPE_CHECKING:
    from kdstore.readers.store import Store

METRICS_FILE = "metrics.json"


def run_training(
    config: TrainConfig, *, resume: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train, evaluate, save; the figures that are also in ``output_dir/metrics.json``.

    The folder then holds the student, its tokenizer and ``metrics.json``: ``train_loss``,
    ``steps``, the store's ``num_samples`` and ``config_digest`` and, with `eval`, ``eval_loss``
    (nats per token), ``eval_perplexity`` and ``eval_num_tokens``. ``resume`` continues from the
    last checkpoint in the folder. Raises UsageError, StoreNotFoundError, StoreMismatchError or
    InputError.
    """
    if quiet:
        transformers_logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    store = _open_store(config)
    model = build_student(config.student, seed=config.seed)
    tokenizer = load_tokenizer(config.student, store)
    check_vocabulary(model, tokenizer, store)
    inputs = InputConfig.from_dict(store.header.identity["input"])
    held_out = read_held_out(config.eval, tokenizer, inputs) if config.eval else None
    trainer = make_trainer(config, model, store, held_out, quiet=quiet)
    result = trainer.train(resume_from_checkpoint=_checkpoint(config) if resume else None)
    metrics = {
        "train_loss": result.training_loss,
        "steps": result.global_step,
        "num_samples": len(store),
        "config_digest": store.config_digest,
        **(trainer.evaluate() if held_out is not None else {}),
    }
    _save(trainer, config, store, tokenizer, metrics)
    return metrics


def _open_store(config: TrainConfig) -> Store:
    store = kdstore.open(config.store)
    if not len(store):
        raise UsageError(
            "the store has no committed samples",
            where=config.store,
            expected="at least one committed unit",
            got=0,
            todo="let kdstore dump finish first",
        )
    return store


def make_trainer(
    config: TrainConfig,
    model: Any,
    store: Store,
    held_out: list[Sample] | None,
    *,
    quiet: bool = False,
) -> DistillTrainer:
    """The trainer of a configuration; it reports to standard error, or not at all."""
    trainer = DistillTrainer(
        model,
        training_arguments(config),
        train_dataset=store,
        losses=config.losses,
        data_collator=kdstore.Collator(pack=config.pack),
        eval_dataset=held_out,
        callbacks=None if quiet else [LogLines()],
    )
    # Both write to standard output, which is the command's.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """TrainingArguments of a configuration; UsageError for values that they refuse."""
    pin = torch.cuda.is_available()
    defaults = {"disable_tqdm": True, "dataloader_pin_memory": pin, "report_to": "none"}
    chosen = {"seed": config.seed, "remove_unused_columns": False}
    if config.eval is not None:
        chosen["per_device_eval_batch_size"] = config.eval.batch_size
    try:
        return TrainingArguments(**(defaults | config.training | chosen))
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(
            "transformers refuses the training arguments", where="training", got=str(error)
        ) from error


def read_held_out(config: EvalConfig, tokenizer: Any, inputs: InputConfig) -> list[Sample]:
    """The samples of the held-out text, tokenised as ``inputs`` says, runs by the score rule.

    Rows longer than `eval.max_length` are split, whatever ``inputs`` does with them.
    """
    source = open_source(config.data)
    inputs = replace(inputs, max_length=config.max_length, overlong="split")
    builder = SampleBuilder(tokenizer, inputs, source.name, locate=source.locate)
    samples = [sample for number, row in source.rows() for sample in builder.samples(number, row)]
    return [sample.with_score_rule(config.score) for sample in samples]


class LogLines(TrainerCallback):  # type: ignore[misc]
    """One plain line on standard error per log, from the first process."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the figures of a log with the step they belong to."""
        del args, control
        if state.is_world_process_zero:
            logs = kwargs["logs"]
            figures = [f"{name} {_short(value)}" for name, value in logs.items()]
            print(
                f"step {state.global_step}/{state.max_steps}", *figures, sep="  ", file=sys.stderr
            )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _checkpoint(config: TrainConfig) -> str:
    folder = config.output_dir
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise UsageError(
            "nothing to resume",
            where=folder,
            expected="a folder checkpoint-N",
            got="none",
            todo="leave out --resume, or set training.save_steps in the run to be resumed",
        )
    return str(found)


def _save(
    trainer: DistillTrainer,
    config: TrainConfig,
    store: Store,
    tokenizer: Any,
    metrics: dict[str, Any],
) -> None:
    """Student, tokenizer and figures into the output folder; every rank takes part in the first."""
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    if config.student.path is None:
        store.copy_tokenizer(str(config.output_dir))
    else:
        tokenizer.save_pretrained(config.output_dir)
    text = json.dumps(metrics, indent=2, sort_keys=True) + "\n"
    (config.output_dir / METRICS_FILE).write_text(text, encoding="utf-8")
