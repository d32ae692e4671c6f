"""The configuration of `kdstore train`: YAML -> frozen dataclasses, with refusals that help.

Relative paths are relative to the current working directory, not to the YAML file.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from kdstore.errors import UsageError
from kdstore.train.fields import build, check_type, refuse_unknown

# What the trainer itself decides; a second source for one of them would win in silence.
RESERVED_TRAINING = {
    "seed": "set `seed` at the top level",
    "per_device_eval_batch_size": "set `eval.batch_size`",
    "remove_unused_columns": "leave it out: batches carry the teacher's signal",
    "resume_from_checkpoint": "use `kdstore train --resume`",
}


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model to train: weights at ``path``, or a new one from the folder ``config``.

    Exactly one of the two. ``dtype`` is that of the weights; mixed precision is `training.bf16`.
    """

    path: str | None = None
    config: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise UsageError(
                "a student is either a saved model or a new one",
                where="student",
                expected="exactly one of student.path and student.config",
                got={"path": self.path, "config": self.config},
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out text ``data`` (as `kdstore dump --data`), scored by cross-entropy per token.

    ``max_length`` defaults to the store's, or the student's where that is less. ``score`` says
    which tokens count: the supervised ones or all but the first.
    """

    data: str
    batch_size: int = 8
    max_length: int | None = None
    score: Literal["supervised", "all"] = "supervised"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(
                "no batch", where="eval.batch_size", expected="1 or more", got=self.batch_size
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    * ``store``: path or URL of the store
    * ``losses``: name -> weight, total = Σ weight · loss; a weight of 0 computes nothing
    * ``pack``: lay the samples of a batch in one row instead of padding them
    * ``training``: fields of `transformers.TrainingArguments`, ``output_dir`` among them
    * ``seed``: initial weights of a new student, order of the samples, dropout
    """

    store: str
    student: StudentConfig
    training: dict[str, Any]
    losses: dict[str, float] = field(default_factory=lambda: {"forward_kl": 1.0})
    pack: bool = False
    eval: EvalConfig | None = None
    seed: int = 0

    @property
    def output_dir(self) -> Path:
        """Where checkpoints, the student, its tokenizer and metrics.json go."""
        return Path(self.training["output_dir"])


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration in a YAML file after ``key=value`` overrides such as ``losses.ce=0.5``.

    Raises UsageError naming the key for an unknown key, a wrong type or a missing value.
    """
    data = _read_yaml(Path(path))
    for text in overrides or []:
        _override(data, text)
    config: TrainConfig = build(TrainConfig, data)
    _check_losses(config.losses)
    _check_training(config.training)
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = _parse(path.read_text(encoding="utf-8"), where=str(path))
    except OSError as error:
        raise UsageError("cannot read the configuration", where=path, got=error.strerror) from error
    if not isinstance(data, dict):
        raise UsageError(
            "a configuration is a mapping",
            where=path,
            expected="keys such as store, student, losses, training",
            got=type(data).__name__,
        )
    return data


class _Loader(yaml.SafeLoader):
    """Safe YAML whose floats may lack a dot: YAML 1.1 reads 1e-3 as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _parse(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError("not valid YAML", where=where, got=str(error)) from error


def _override(data: dict[str, Any], text: str) -> None:
    """Set a dotted key in the nested mappings of ``data``, making those that are missing."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError("not an override", expected="key=value or outer.inner=value", got=text)
    *outer, last = key.split(".")
    for name in outer:
        if data.get(name) is None:
            data[name] = {}
        data = data[name]
        if not isinstance(data, dict):
            raise UsageError(f"{name!r} has no keys inside", where=text, got=data)
    data[last] = _parse(value, where=text)


def _check_losses(losses: dict[str, float]) -> None:
    from kdstore.train.losses import LOSSES

    refuse_unknown(losses, LOSSES, where="losses")
    if not all(math.isfinite(weight) for weight in losses.values()):
        raise UsageError("a weight is not finite", where="losses", expected="numbers", got=losses)
    if not any(losses.values()):
        raise UsageError(
            "no loss to train on", where="losses", expected="a weight other than 0", got=losses
        )


def _check_training(training: dict[str, Any]) -> None:
    from transformers import TrainingArguments

    for name, todo in RESERVED_TRAINING.items():
        if name in training:
            raise UsageError(f"training.{name} is not yours to set", todo=todo)
    hints = get_type_hints(TrainingArguments)
    names = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    refuse_unknown(training, names, where="training")
    for name, value in training.items():
        check_type(f"training.{name}", value, hints[name])
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if training.get(name, 1) < 1:
            raise UsageError(
                "too small", where=f"training.{name}", expected="1 or more", got=training[name]
            )
    if not training.get("output_dir"):
        raise UsageError("missing key", where="training", expected="output_dir")
