"""One training run from its configuration: what `kdstore train` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

import kdstore
from kdstore.errors import KDStoreError, StoreMismatchError, TrainingError, UsageError
from kdstore.inputs import InputConfig, SampleBuilder, open_source
from kdstore.sample import Sample
from kdstore.train.checkpoint import last_checkpoint
from kdstore.train.config import EvalConfig, TrainConfig
from kdstore.train.data import is_loaded
from kdstore.train.student import (
    build_student,
    check_architecture,
    check_vocabulary,
    load_tokenizer,
    longest_sequence,
)
from kdstore.train.trainer import DistillTrainer

if TYPE_CHECKING:
    from kdstore.readers.store import Store

METRICS_FILE = "metrics.json"
RUN_FILE = "run.json"


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
    check_architecture(model, pack=config.pack)
    inputs = InputConfig.from_dict(store.header.identity["input"])
    held_out = read_held_out(config.eval, tokenizer, inputs, model) if config.eval else None
    trainer = make_trainer(config, model, store, held_out, quiet=quiet)
    checkpoint = _checkpoint(config, store) if resume else None
    _record_run(config, store)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    _save_student(trainer, config, store, tokenizer)
    _check_finite(trainer.model)
    metrics = {
        "train_loss": result.training_loss,
        "steps": result.global_step,
        "num_samples": len(store),
        "store_complete": store.is_complete,
        "config_digest": store.config_digest,
        **(trainer.evaluate() if held_out is not None else {}),
    }
    if trainer.is_world_process_zero():
        text = json.dumps(metrics, indent=2, sort_keys=True)
        (config.output_dir / METRICS_FILE).write_text(text + "\n")
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
    if not store.is_complete:
        print(
            f"kdstore: warning: the store is unfinished, {len(store.commits)} of "
            f"{store.header.num_units} units; training on the samples that are committed now",
            file=sys.stderr,
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
    arguments = training_arguments(config)
    with _transformers_refusals():
        trainer = DistillTrainer(
            model,
            arguments,
            train_dataset=store,
            losses=config.losses,
            eval_dataset=held_out,
            **_batches(config, model, store),
            callbacks=None if quiet else [LogLines()],
        )
    # Both write to standard output, which is the command's.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _batches(config: TrainConfig, model: Any, store: Store) -> dict[str, Any]:
    """How batches are made, of a store or of a list of samples."""
    if not is_loaded(store):
        return {"data_collator": kdstore.Collator(pack=config.pack)}
    if not config.pack:
        return {}
    limits = (store.header.identity["input"]["max_length"], longest_sequence(model))
    length = min((limit for limit in limits if limit), default=None)
    return {"loader": {"pack": True, "max_length": length}}


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """TrainingArguments of a configuration; UsageError for values that they refuse."""
    pin = torch.cuda.is_available()
    defaults = {
        "disable_tqdm": True,
        "dataloader_pin_memory": pin,
        "report_to": "none",
        "logging_nan_inf_filter": False,  # it would report a loss of NaN as the last finite one
    }
    chosen = {"seed": config.seed, "remove_unused_columns": False}
    if config.eval is not None:
        chosen["per_device_eval_batch_size"] = config.eval.batch_size
    with _transformers_refusals():
        return TrainingArguments(**(defaults | config.training | chosen))


@contextmanager
def _transformers_refusals() -> Iterator[None]:
    try:
        yield
    except KDStoreError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UsageError(
            "transformers refuses the training arguments", where="training", got=str(error)
        ) from error


def read_held_out(
    config: EvalConfig, tokenizer: Any, inputs: InputConfig, model: Any
) -> list[Sample]:
    """The samples of the held-out text, tokenised as ``inputs`` says, runs by the score rule.

    Rows longer than `eval.max_length` are split, whatever ``inputs`` does with them; by default
    that is the store's length or, if it is shorter, ``model``'s. Raises StoreMismatchError if it
    is set to more than ``model`` takes.
    """
    limit = longest_sequence(model)
    defaults = [length for length in (inputs.max_length, limit) if length]
    length = config.max_length or min(defaults, default=None)
    if limit is not None and length is not None and length > limit:
        raise StoreMismatchError(
            "held-out samples would be longer than the model takes",
            where="eval.max_length",
            expected=f"at most {limit} (max_position_embeddings)",
            got=length,
            todo="set eval.max_length",
        )
    source = open_source(config.data)
    inputs = replace(inputs, max_length=length, overlong="split")
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


def _checkpoint(config: TrainConfig, store: Store) -> str:
    """The last checkpoint in the output folder, if it is one of this very run."""
    folder = config.output_dir
    found = last_checkpoint(folder)
    if found is None or not (folder / RUN_FILE).exists():
        raise UsageError(
            "nothing to resume",
            where=folder,
            expected=f"a complete folder checkpoint-N, and {RUN_FILE}",
            got="none",
            todo="leave out --resume, or set training.save_steps in the run to be resumed",
        )
    recorded = json.loads((folder / RUN_FILE).read_text())
    for name, value in _run_identity(config, store).items():
        if recorded.get(name) != value:
            raise StoreMismatchError(
                f"the checkpoint is of another run: {name} differs",
                where=folder,
                expected=recorded.get(name),
                got=value,
                todo="repeat the settings of that run, or train into a new output_dir",
            )
    return str(found)


def _run_identity(config: TrainConfig, store: Store) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it."""
    return {
        "store": store.config_digest,
        "draws": store.num_draws,
        "student": asdict(config.student),
        "losses": config.losses,
        "pack": config.pack,
        "seed": config.seed,
    }


def _record_run(config: TrainConfig, store: Store) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_run_identity(config, store), indent=2)
    (config.output_dir / RUN_FILE).write_text(text + "\n")


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TrainingError(
                "training diverged: the student has weights that are not finite",
                where=name,
                expected="finite weights",
                got="NaN or infinity",
                todo="lower the learning rate, or go on from an earlier checkpoint",
            )


def _save_student(
    trainer: DistillTrainer, config: TrainConfig, store: Store, tokenizer: Any
) -> None:
    """Student and tokenizer into the output folder; every rank takes part in the first."""
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    if config.student.path is None:
        store.copy_tokenizer(str(config.output_dir))
    else:
        tokenizer.save_pretrained(config.output_dir)
