"""Local transformers checkpoints: what they are before loading, and loading them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import SafetensorError

from kdstore.errors import TeacherError, UsageError
from kdstore.sample import Sample

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
_TENSOR_START_BYTES = 1 << 12
_BLOCK_BYTES = 1 << 22
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint before it is loaded.

    ``vocab_size`` is the width of its logits, ``max_length`` the longest sequence it takes (None if
    it does not say), ``dtype`` what it will compute in, ``revision`` a hash of its files.
    ``quantization`` and ``logits_dtype`` are what an engine was told besides.
    ``mixes_lengths`` is False where the longest row of a batch changes the others' answers.
    """

    path: Path
    name: str
    revision: str
    dtype: str
    vocab_size: int
    max_length: int | None
    mixes_lengths: bool = True
    quantization: str | None = None
    logits_dtype: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The teacher's part in a store's identity."""
        quantized = {} if self.quantization is None else {"quantization": self.quantization}
        return {
            "name": self.name,
            "revision": self.revision,
            "dtype": self.dtype,
            "logits_dtype": self.logits_dtype or self.dtype,
            **quantized,
        }

    def check_lengths(self, samples: Iterable[Sample]) -> None:
        """TeacherError for a sample that is longer than the teacher takes."""
        longest = max(samples, key=lambda sample: sample.num_tokens, default=None)
        if self.max_length is None or longest is None or longest.num_tokens <= self.max_length:
            return
        raise TeacherError(
            "a sample is longer than the teacher takes",
            where=f"sample {longest.sample_id!r}",
            expected=f"at most {self.max_length} tokens",
            got=longest.num_tokens,
            todo="split long samples with max_length",
        )


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
        max_length=_max_length(text),
        mixes_lengths="longrope" not in _rope_types(text),
    )


def load_model(info: CheckpointInfo, *, device: str) -> Any:
    """The checkpoint's causal LM, in evaluation mode on a device."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is drawn in kdstore.progress alone
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            info.path, dtype=_DTYPES[info.dtype], output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise TeacherError("cannot load the teacher", where=info.path, got=error) from error
    _check_loaded(loading, info)
    return model.to(device).eval().requires_grad_(False)


def check_device(device: str) -> str:
    """The device, if torch can use it here; UsageError if not."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"torch cannot use the device {device!r}",
            where="--device",
            expected="cpu, or a device that this build of torch drives here",
            got=str(error).splitlines()[0],
        ) from error
    return device


def _check_loaded(loading: dict[str, Any], info: CheckpointInfo) -> None:
    """transformers fills weights that a checkpoint lacks with random ones and only warns."""
    for name in ("missing_keys", "mismatched_keys", "error_msgs"):
        if loading.get(name):
            raise TeacherError(
                "the checkpoint does not hold all of the model's weights",
                where=info.path,
                expected=f"no {name.replace('_', ' ')}",
                got=", ".join(map(str, sorted(loading[name], key=str)[:5])),
                todo="use the full checkpoint of a causal LM, head included",
            )


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


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a model: one, or one per type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return [rope for rope in (parameters, *nested) if "rope_type" in rope]


def _rope_types(config: Any) -> set[str]:
    return {rope["rope_type"] for rope in _ropes(config)}


def _max_length(config: Any) -> int | None:
    """Longest sequence whose answers depend on nothing but itself.

    Beyond its original length, transformers' dynamic rotary factors follow the longest row so far.
    """
    lengths = [getattr(config, "max_position_embeddings", None)]
    lengths += [
        rope.get("original_max_position_embeddings")
        for rope in _ropes(config)
        if rope["rope_type"] == "dynamic"
    ]
    return min((length for length in lengths if length), default=None)


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
    """xxh3_128 over config and weights.

    Of a safetensors file its header and the first 4 KiB of every tensor: reading terabytes to tell
    two checkpoints apart is not worth it, and training moves a tensor everywhere or not at all.
    Other weight files in full.
    """
    digest = xxhash.xxh3_128((folder / "config.json").read_bytes())
    files = sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern))
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as handle:
            blocks = _tensor_starts(handle) if file.suffix == ".safetensors" else _blocks(handle)
            for block in blocks:
                digest.update(block)
    return digest.hexdigest()


def _tensor_starts(file: BinaryIO) -> Iterator[bytes]:
    size = int.from_bytes(file.read(8), "little")
    header = file.read(size)
    yield header
    try:
        tensors = json.loads(header)
        starts = sorted(t["data_offsets"] for name, t in tensors.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError):
        return  # damaged: loading it will say so
    for start, end in starts:
        file.seek(8 + size + start)
        yield file.read(min(end - start, _TENSOR_START_BYTES))


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block
