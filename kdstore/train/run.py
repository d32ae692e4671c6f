"""One training run from its configuration: what `kdstore train` does."""

from __future__ import annotations

from typing import Any

from kdstore.train.config import TrainConfig
from kdstore.train.prepare import Prepared, make_trainer, prepare
from kdstore.train.results import measure, write_results
from kdstore.train.resume import last_checkpoint, record_run
from kdstore.train.sources import describe_data, stores_of
from kdstore.train.trainer import DistillTrainer
from kdstore.train.watch import TokenMeter, TrainingWatch


def run_training(
    config: TrainConfig, *, resume: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train, evaluate, save; the figures that are also in ``output_dir/metrics.json``.

    The folder then holds the student, its tokenizer, ``metrics.json``, ``history.jsonl`` (what was
    logged) and ``curves.png``. Figures: ``steps``, ``epoch`` and ``train_loss``; ``train_tokens``,
    ``train_seconds`` and ``tokens_per_second`` of this session; ``losses``, first and last; what it
    was trained on; with `eval`, ``eval_loss`` (nats per token), ``eval_perplexity`` and
    ``eval_num_tokens``. ``resume`` continues from the last checkpoint in the folder. Raises
    UsageError, StoreNotFoundError, StoreMismatchError, InputError or TrainingError.
    """
    prepared = prepare(config, quiet=quiet)
    watch = TrainingWatch(TokenMeter(prepared.model), shown=config.losses, quiet=quiet)
    trainer = make_trainer(config, prepared, callbacks=[watch])
    checkpoint = last_checkpoint(config, prepared.data) if resume else None
    record_run(config, prepared.data)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    _save_student(trainer, config, prepared)
    trainer.check_weights()
    evaluation = {} if prepared.held_out is None else trainer.evaluate()
    history = trainer.state.log_history
    metrics = {
        "steps": result.global_step,
        "epoch": trainer.state.epoch,
        "train_loss": result.training_loss,
        **measure(config, watch, history),
        **describe_data(prepared.data),
        **evaluation,
    }
    if not trainer.is_world_process_zero():
        return metrics
    return write_results(config, metrics, history, quiet=quiet)


def _save_student(trainer: DistillTrainer, config: TrainConfig, prepared: Prepared) -> None:
    """Student and tokenizer into the output folder; every rank takes part in the first."""
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    if config.student.source is None:
        stores_of(prepared.data)[0].copy_tokenizer(str(config.output_dir))
    else:
        prepared.tokenizer.save_pretrained(config.output_dir)
