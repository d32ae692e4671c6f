"""Random teachers of a given size, and token rows for them, for the benchmarks of dumps."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny" / "teacher"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Size:
    """A Llama: width, layers and vocabulary."""

    hidden: int
    layers: int
    vocab: int


def save_teacher(folder: Path, size: Size, *, max_length: int) -> Path:
    """A checkpoint with random weights; its tokenizer has fewer ids than it has logits."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=max(1, size.hidden // 128),
        max_position_embeddings=max_length,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def save_rows(path: Path, *, rows: int, length: int, seed: int = 0) -> Path:
    """JSON lines of random ``input_ids``; lengths from a half of ``length`` to all of it."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(length // 2, length + 1, rows)
    ids = (generator.integers(3, 2000, size).tolist() for size in lengths)
    lines = (json.dumps({"id": f"row-{n}", "input_ids": one}) for n, one in enumerate(ids))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
