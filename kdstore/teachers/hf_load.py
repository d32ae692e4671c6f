"""Local transformers checkpoints: what they are before loading, and loading them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from kdstore.errors import TeacherError, UsageError

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
_EDGE_BYTES = 1 << 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint before it is loaded.

    ``vocab_size`` is the width of its logits, ``max_length`` the longest sequence it takes (None if
    it does not say), ``dtype`` what it will compute in, ``revision`` a hash of its files.
    """

    path: Path
    name: str
    revision: str
    dtype: str
    vocab_size: int
    max_length: int | None

    @property
    def identity(self) -> dict[str, Any]:
        """The teacher's part in a store's identity."""
        return {
            "name": self.name,
            "revision": self.revision,
            "dtype": self.dtype,
            "logits_dtype": self.dtype,
        }


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_checkpoint(path: str | Path, *, dtype: str = "auto", device: str) -> CheckpointInfo:
    """What a checkpoint folder holds.

    ``dtype`` ``auto`` means float32 on a CPU, else what the checkpoint was saved in. Raises
    TeacherError if the folder is missing or is no checkpoint, UsageError for an unknown dtype.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TeacherError(
            "there is no teacher here",
            where=folder,
            expected="a folder that save_pretrained wrote (config.json, weights, tokenizer)",
            got="no such folder",
            todo="download the model first; kdstore loads teachers from local folders only",
        )
    config = _load_config(folder)
    text = config.get_text_config()
    return CheckpointInfo(
        path=folder,
        name=folder.resolve().name,
        revision=_revision(folder),
        dtype=_resolve_dtype(dtype, config, device),
        vocab_size=int(text.vocab_size),
        max_length=getattr(text, "max_position_embeddings", None),
    )


def load_model(info: CheckpointInfo, *, device: str) -> Any:
    """The checkpoint's causal LM, in evaluation mode on a device."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is drawn in kdstore.progress alone
    try:
        model = AutoModelForCausalLM.from_pretrained(info.path, dtype=_DTYPES[info.dtype])
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise TeacherError("cannot load the teacher", where=info.path, got=error) from error
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer in a checkpoint folder; TeacherError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            "cannot load the teacher's tokenizer",
            where=path,
            expected="tokenizer.json and tokenizer_config.json",
            got=error,
            todo="save the tokenizer beside the model with save_pretrained",
        ) from error


def _load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            "the teacher's config.json cannot be read", where=folder, got=error
        ) from error


def _resolve_dtype(name: str, config: Any, device: str) -> str:
    if name == "auto":
        saved = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
        return "float32" if device == "cpu" else saved
    resolved = _ALIASES.get(name, name)
    if resolved not in _DTYPES:
        raise UsageError(
            f"unknown dtype {name!r}", expected=", ".join(["auto", *_DTYPES, *_ALIASES]), got=name
        )
    return resolved


def _revision(folder: Path) -> str:
    """xxh3_128 over config and weights: of each weight file its name, size, first and last MiB.

    Reading terabytes to tell two checkpoints apart is not worth it; a fine-tune changes every
    tensor, so also those at the edges.
    """
    digest = xxhash.xxh3_128((folder / "config.json").read_bytes())
    files = sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_EDGE_BYTES))
            handle.seek(max(size - _EDGE_BYTES, 0))
            digest.update(handle.read(_EDGE_BYTES))
    return digest.hexdigest()
