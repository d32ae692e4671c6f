"""The configuration of `kdstore train`: YAML -> frozen dataclasses, with refusals that help.

Relative paths are relative to the current working directory, not to the YAML file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from kdstore.errors import UsageError
from kdstore.readers.batches import BatchConfig
from kdstore.readers.weights import TokenWeights
from kdstore.teachers.scoring import ScoringOptions
from kdstore.train.fields import build, check_type, refuse_reserved, refuse_unknown
from kdstore.train.yamlfile import override, read_mapping, to_yaml

# What is decided elsewhere; a second source for one of them would win in silence.
RESERVED_TRAINING = {
    "seed": "set `seed` at the top level",
    "per_device_train_batch_size": "set `loader.batch_size` or `loader.batch_tokens`",
    "per_device_eval_batch_size": "set `eval.batch_size`",
    "remove_unused_columns": "leave it out: batches carry the teacher's signal",
    "resume_from_checkpoint": "use `kdstore train --resume`",
}
RESERVED_LOADER = {
    "seed": "set `seed` at the top level, or `training.data_seed` for the order alone",
    "shuffle": "set `training.train_sampling_strategy` to random or sequential",
}
RESERVED = {"loader": RESERVED_LOADER, "training": RESERVED_TRAINING}
TRAINING_DEFAULTS = {
    "disable_tqdm": True,  # its bar would stand beside ours
    "report_to": "none",
    "logging_steps": 10,
    "logging_first_step": True,
}
DEFAULT_BATCH_SIZE = 8
# A teacher records units one by one, so few are to be begun at once; as many as GPUs share a node.
ONLINE_ORDER = {"streams": 8, "shards_at_once": 1}


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model to train; exactly one of

    * ``path``: a saved model
    * ``config``: a folder with config.json, for new weights
    * ``prune``: a saved model of which only some ``layers`` are kept: that many, evenly spaced, or
      those that are listed

    ``dtype`` is that of the weights; mixed precision is `training.bf16`. ``attn_implementation``
    goes to transformers: sdpa, eager, flash_attention_2, …; varlen_sdpa is ours, for packed rows
    """

    path: str | None = None
    config: str | None = None
    prune: str | None = None
    layers: int | list[int] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("path", "config", "prune")}
        if sum(value is not None for value in given.values()) != 1:
            raise UsageError(
                "a student is a saved model, a new one, or a pruned copy",
                where="student",
                expected="exactly one of student.path, student.config and student.prune",
                got=given,
            )
        if (self.prune is None) != (self.layers is None):
            raise UsageError(
                "a pruned student needs the layers to keep, and only that one does",
                where="student",
                expected="student.prune and student.layers, or neither",
                got={"prune": self.prune, "layers": self.layers},
            )

    @property
    def source(self) -> str | None:
        """The saved model that the weights come from; None for new ones."""
        return self.path or self.prune


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, trained instead of the weights; names as in `peft.LoraConfig`.

    ``alpha`` and ``dropout`` are its ``lora_alpha`` and ``lora_dropout``. ``modules_to_save`` are
    trained whole and saved with the adapters.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UsageError("no rank", where="lora.r", expected="1 or more", got=self.r)
        if not 0 <= self.dropout < 1:
            raise UsageError(
                "no probability",
                where="lora.dropout",
                expected="0 to 1, without 1",
                got=self.dropout,
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What a student is evaluated on; exactly one of

    * ``data``: held-out text, as `kdstore dump --data`
    * ``store``: a store of held-out samples, whose teacher the student is then compared with too

    ``max_samples`` are read at most. Of text, ``max_length`` defaults to the store's, or the
    student's where that is less, and ``score`` says which tokens count: the supervised ones or all
    but the first.
    """

    data: str | None = None
    store: str | None = None
    batch_size: int = 8
    max_samples: int | None = None
    max_length: int | None = None
    score: Literal["supervised", "all"] = "supervised"

    def __post_init__(self) -> None:
        if (self.data is None) == (self.store is None):
            raise UsageError(
                "an evaluation is of text or of a store",
                where="eval",
                expected="exactly one of eval.data and eval.store",
                got={"data": self.data, "store": self.store},
            )
        if self.store is not None and (self.max_length is not None or self.score != "supervised"):
            raise UsageError(
                "what a store holds was cut and scored when it was dumped",
                where="eval.max_length and eval.score",
                expected="neither, with eval.store",
                got={"max_length": self.max_length, "score": self.score},
            )
        for name in ("batch_size", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError("too few", where=f"eval.{name}", expected="1 or more", got=value)


@dataclass(frozen=True, kw_only=True)
class MemberConfig:
    """A store of a mixture, or several that are read as one, and its share of the samples."""

    store: str | list[str]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(ScoringOptions):
    """A teacher that scores ``data`` while it is trained on, by the options of `kdstore dump`.

    ``record`` is where what it says in the first epoch is stored and read from: a store as a dump
    makes it, or one that is to be finished.
    """

    record: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.audit_fraction and self.record is None:
            raise UsageError(
                "audits are stored, and nothing is",
                where="teacher.audit_fraction",
                expected="teacher.record",
                got=self.audit_fraction,
                todo="set teacher.record, or leave audit_fraction out",
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    * ``store``: path or URL of the store, or a list of them that are read as one; or instead
      ``mixture``: stores with their shares; or ``teacher``: who scores samples in this process
    * ``teachers``: name -> store, of what others said of the samples of ``store``
    * ``cache_dir``, ``cache_bytes``: where shards of remote stores are kept
    * ``loader``: which batches there are; order is of ``seed`` and `training`
    * ``losses``: what `kdstore.train.objective.Objective` takes: name -> weight, or its options
    * ``weights``: how much each scored position counts
    * ``fused``: take losses from hidden states, without whole logits
    * ``lora``: adapters to train, ``freeze``: patterns of parameters not to
    * ``training``: fields of `transformers.TrainingArguments`, ``output_dir`` among them
    * ``seed``: initial weights of a new student, order of the samples, dropout
    """

    store: str | list[str] | None = None
    mixture: list[MemberConfig] | None = None
    teacher: TeacherConfig | None = None
    teachers: dict[str, str] = field(default_factory=dict)
    cache_dir: str | None = None
    cache_bytes: int | None = None
    student: StudentConfig
    loader: BatchConfig = field(default_factory=lambda: BatchConfig(batch_size=DEFAULT_BATCH_SIZE))
    losses: dict[str, Any] = field(default_factory=lambda: {"forward_kl": 1.0})
    weights: TokenWeights | None = None
    fused: bool = True
    lora: LoraConfig | None = None
    freeze: list[str] = field(default_factory=list)
    eval: EvalConfig | None = None
    training: dict[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "training", TRAINING_DEFAULTS | self.training)
        _check_sources(self)
        _check_adapters(self)

    @property
    def output_dir(self) -> Path:
        """Where checkpoints, the student, its tokenizer and metrics.json go."""
        return Path(self.training["output_dir"])

    @property
    def loader_options(self) -> dict[str, Any]:
        """The options of ``loader`` that are set there."""
        options = dataclasses.asdict(self.loader)
        return {name: value for name, value in options.items() if name not in RESERVED_LOADER}


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration in a YAML file after ``key=value`` overrides such as ``losses.ce=0.5``.

    Raises UsageError naming the key for an unknown key, a wrong type or a missing value.
    """
    data = read_mapping(Path(path))
    for text in overrides or []:
        override(data, text)
    for section, reserved in RESERVED.items():
        if isinstance(given := data.get(section), Mapping):
            refuse_reserved(given, reserved, where=section)
    config: TrainConfig = build(TrainConfig, _with_online_order(_with_default_batch(data)))
    _check_losses(config)
    _check_training(config.training)
    return config


def print_config(config: TrainConfig) -> str:
    """YAML that loads back to the same configuration, with every key that there is.

    Of `training` it has what was set and what kdstore sets; the rest is transformers' own.
    """
    data = {**dataclasses.asdict(config), "loader": config.loader_options}
    return to_yaml(data)


def _with_default_batch(data: dict[str, Any]) -> dict[str, Any]:
    """``data`` with batches of the default size, where it says nothing of their size."""
    loader = data.get("loader")
    if isinstance(loader, dict) and not {"batch_size", "batch_tokens"} & set(loader):
        return {**data, "loader": {"batch_size": DEFAULT_BATCH_SIZE, **loader}}
    return data


def _with_online_order(data: dict[str, Any]) -> dict[str, Any]:
    """``data`` with an order that begins few units at once, where a teacher is asked."""
    if not data.get("teacher"):
        return data
    loader = data.get("loader", {"batch_size": DEFAULT_BATCH_SIZE})
    return {**data, "loader": {**ONLINE_ORDER, **loader} if isinstance(loader, dict) else loader}


def _check_sources(config: TrainConfig) -> None:
    given = {name: getattr(config, name) for name in ("store", "mixture", "teacher")}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise UsageError(
            "a run needs what to train on",
            where="configuration",
            expected="exactly one of store, mixture and teacher",
            got=", ".join(named) or "none",
        )
    workers = config.training.get("dataloader_num_workers", 0)
    if config.teacher is not None and workers:
        raise UsageError(
            "workers cannot read what an online teacher scores: it is in this process",
            where="training.dataloader_num_workers",
            expected="0",
            got=workers,
            todo="leave it out, or dump a store and train on that",
        )
    if config.store == [] or config.mixture == []:
        raise UsageError(
            "no stores to read", where="store or mixture", expected="one at least", got="[]"
        )
    if config.mixture is not None and config.teachers:
        raise UsageError(
            "other teachers are joined to one store, not to a mixture",
            where="teachers",
            expected="store, or no teachers",
            got=", ".join(config.teachers),
        )


def _check_adapters(config: TrainConfig) -> None:
    if config.lora is None:
        return
    if config.freeze:
        raise UsageError(
            "lora freezes everything but its adapters already",
            where="freeze",
            expected="freeze or lora, not both",
            got=config.freeze,
            todo="leave out freeze or lora; lora.modules_to_save are trained whole",
        )
    if config.student.path is None:
        raise UsageError(
            "adapters are saved without the model that they are for, which nobody else has",
            where="lora",
            expected="student.path",
            got=f"student.{'prune' if config.student.prune else 'config'}",
            todo="save that student first (a run without lora), then set student.path to it",
        )


def _check_losses(config: TrainConfig) -> None:
    from kdstore.train.objective import Objective

    for teacher in Objective(config.losses).teachers:
        if teacher is not None and teacher not in config.teachers:
            raise UsageError(
                "a loss listens to a teacher that the configuration does not have",
                where="losses",
                expected=", ".join(config.teachers) or "a name of `teachers`, which is empty",
                got=teacher,
                todo=f"add its store: teachers.{teacher}=URL",
            )


def _check_training(training: dict[str, Any]) -> None:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    names = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    refuse_unknown(training, names, where="training")
    for name, value in training.items():
        check_type(f"training.{name}", value, hints[name])
    if training.get("gradient_accumulation_steps", 1) < 1:
        raise UsageError(
            "too small",
            where="training.gradient_accumulation_steps",
            expected="1 or more",
            got=training["gradient_accumulation_steps"],
        )
    if not training.get("output_dir"):
        raise UsageError(
            "missing key",
            where="training",
            expected="output_dir",
            got=training.get("output_dir"),
            todo="add training.output_dir=FOLDER; checkpoints and the student go there",
        )
