"""Everything that a run needs, loaded, checked against each other, and put together."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from kdstore.errors import KDStoreError, UsageError
from kdstore.inputs import InputConfig
from kdstore.train.heldout import read_held_out
from kdstore.train.sources import check_losses, open_data, stores_of
from kdstore.train.student import (
    build_student,
    check_architecture,
    check_vocabulary,
    load_tokenizer,
)
from kdstore.train.trainable import add_adapters, freeze_parameters
from kdstore.train.trainer import DistillTrainer

if TYPE_CHECKING:
    from kdstore.readers.mixture import Mixture
    from kdstore.readers.samples import Samples
    from kdstore.sample import Sample
    from kdstore.train.config import TrainConfig


@dataclass(frozen=True)
class Prepared:
    """Parts of a run that fit each other; ``held_out`` is None without `eval`."""

    data: Samples | Mixture
    model: Any
    tokenizer: Any
    held_out: list[Sample] | None


def prepare(config: TrainConfig, *, quiet: bool) -> Prepared:
    """Open the stores, load the student and the held-out text, check that they fit.

    Raises UsageError, StoreNotFoundError, StoreMismatchError or InputError.
    """
    _hush_transformers(quiet=quiet)
    data = open_data(config, quiet=quiet)
    stores = stores_of(data)
    check_losses(config.losses, data)
    model = build_student(config.student, seed=config.seed)
    tokenizer = load_tokenizer(config.student, stores[0])
    check_vocabulary(model, tokenizer, stores)
    check_architecture(model, pack=config.loader.pack)
    inputs = InputConfig.from_dict(stores[0].header.identity["input"])
    held_out = read_held_out(config.eval, tokenizer, inputs, model) if config.eval else None
    if config.lora is not None:
        model = add_adapters(model, config.lora, seed=config.seed)
    freeze_parameters(model, config.freeze)
    return Prepared(data, model, tokenizer, held_out)


def make_trainer(
    config: TrainConfig, prepared: Prepared, *, callbacks: list[Any]
) -> DistillTrainer:
    """The trainer of a configuration, which says nothing but through its ``callbacks``."""
    arguments = training_arguments(config)
    with _transformers_refusals():
        trainer = DistillTrainer(
            prepared.model,
            arguments,
            losses=config.losses,
            eval_dataset=prepared.held_out,
            callbacks=callbacks,
            train_dataset=prepared.data,
            loader={**config.loader_options, "weights": config.weights},
            fused=config.fused,
        )
    # Both write to standard output, which is the command's.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """TrainingArguments of a configuration; UsageError for values that they refuse."""
    defaults = {"dataloader_pin_memory": torch.cuda.is_available()}
    chosen = {"seed": config.seed, "remove_unused_columns": False}
    if config.loader.batch_size is not None:
        chosen["per_device_train_batch_size"] = config.loader.batch_size
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
            "transformers refuses the training arguments",
            where="training",
            expected="fields of transformers.TrainingArguments that suit each other",
            got=str(error),
            todo="change or leave out what it names",
        ) from error


def _hush_transformers(*, quiet: bool) -> None:
    if quiet:
        transformers_logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
