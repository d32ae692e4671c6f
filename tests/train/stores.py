"""Small stores on disk of random samples, and trainers that read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

import kdstore
from kdstore.filesystem import Folder
from kdstore.readers.store import Store
from kdstore.train.trainer import DistillTrainer
from kdstore.writers.plan import make_plan
from kdstore.writers.store import NewPlan, StoreWriter
from tests.golden.recipes import Recipe
from tests.golden.source import identity_of, tokenizer_of
from tests.train.train_helpers import (
    V,
    ragged_samples,
    tiny_config,
    topk_signal,
    training_arguments,
)

LOSSES = {"forward_kl": 0.75, "ce": 0.25}


def write_store(folder: Path, *, count: int = 40, seed: int = 0) -> Store:
    """A store of ragged samples in several shards, with the four likeliest tokens each."""
    rng = np.random.default_rng(seed)
    samples = [
        replace(sample, signal=topk_signal(rng.normal(size=(sample.num_scored, V)), 4))
        for sample in ragged_samples(count)
    ]
    recipe = Recipe("ragged", V, "topk:k=4", scalars=(), unit_tokens=60, texts=False)
    plan, order = make_plan(
        ((row, [sample]) for row, sample in enumerate(samples)),
        unit_tokens=recipe.unit_tokens,
        vocab_size=V,
        where="ragged",
    )
    writer = StoreWriter.open(
        Folder(folder),
        identity_of(recipe),
        make_plan=lambda: NewPlan(plan, order, {"rows": count}),
        tokenizer_files=tokenizer_of(),
    )
    by_id = {sample.sample_id: sample for sample in samples}
    for unit in writer.pending_units():
        rows = [by_id[name] for name, _ in plan.unit(unit).ids_and_lengths]
        writer.commit(unit, rows, statistics={}, provenance={})
    writer.seal()
    return kdstore.open(folder)


def dropout_model(seed: int = 0) -> LlamaForCausalLM:
    """The tiny model with dropout, so that a step depends on the state of random numbers."""
    torch.manual_seed(seed)
    config = tiny_config()
    config.attention_dropout = 0.3
    return LlamaForCausalLM(config)


def store_trainer(
    model: LlamaForCausalLM,
    data: Any,
    folder: Path,
    *,
    loader: dict[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    **arguments: Any,
) -> DistillTrainer:
    """A trainer on a store; ``arguments`` are TrainingArguments."""
    return DistillTrainer(
        model,
        training_arguments(folder, **arguments),
        train_dataset=data,
        losses=LOSSES,
        loader=loader,
        callbacks=callbacks,
    )
