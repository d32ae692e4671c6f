"""What a dump and an online teacher share: a teacher, the texts it scores, and how."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kdstore.align import TokenTable
from kdstore.errors import UsageError
from kdstore.inputs import InputConfig, SampleBuilder, open_source
from kdstore.inputs.config import Overlong, TokenPolicy
from kdstore.sample import ScoreRule
from kdstore.select import DEFAULT_SCALARS, DEFAULT_SELECTION, parse_selection
from kdstore.select.scalars import LSE_T_PREFIX, temperature_of
from kdstore.teachers.backends import Backend, open_backend
from kdstore.teachers.hf_load import CheckpointInfo, load_tokenizer
from kdstore.teachers.openai_options import ServerOptions
from kdstore.writers.dump import DumpConfig, DumpSource, open_dump

if TYPE_CHECKING:
    from kdstore.filesystem import Folder
    from kdstore.teacher import Teacher
    from kdstore.writers.store import StoreWriter

DEFAULT_BATCH_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Options of `kdstore dump`, with its names and defaults; ``path`` is its ``--teacher``.

    ``vllm`` are fields of vLLM's ``EngineArgs``, such as ``tensor_parallel_size``.
    """

    path: str
    data: str
    split: str = "train"
    backend: str = "hf"
    select: str = DEFAULT_SELECTION
    max_length: int | None = None
    overlong: Overlong = "split"
    add_bos: TokenPolicy = "auto"
    add_eos: TokenPolicy = "auto"
    template_date: str = "2025-01-01"
    template_options: dict[str, Any] = field(default_factory=dict)
    keep_text: bool = False
    score: ScoreRule = "supervised"
    audit_fraction: float = 0.0
    temperatures: list[float] = field(default_factory=list)
    seed: int = 0
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    unit_tokens: int | None = None
    device: str | None = None
    dtype: str = "auto"
    vllm: dict[str, Any] = field(default_factory=dict)
    server: ServerOptions | None = None

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "unit_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(
                    f"no {name}",
                    where=f"--{name.replace('_', '-')}, or teacher.{name}",
                    expected="1 or more",
                    got=value,
                    todo="leave it out for the default",
                )
        if not 0 <= self.audit_fraction <= 1:
            raise UsageError(
                "no share of the positions",
                where="--audit-fraction, or teacher.audit_fraction",
                expected="0 to 1",
                got=self.audit_fraction,
                todo="divide percent by 100",
            )

    @property
    def dump_config(self) -> DumpConfig:
        """What is stored; UsageError for a selection or temperature that there is not."""
        names = [f"{LSE_T_PREFIX}{temperature}" for temperature in self.temperatures]
        return DumpConfig(
            selection=parse_selection(self.select).spec,
            scalars=(*DEFAULT_SCALARS, *scalar_names(names)),
            score=self.score,
            audit_fraction=self.audit_fraction,
            unit_tokens=self.unit_tokens,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """A teacher that is not loaded yet, and the texts it is to score."""

    options: ScoringOptions
    config: DumpConfig
    backend: Backend
    tokenizer: Any
    source: DumpSource

    @classmethod
    def of(cls, options: ScoringOptions) -> Scoring:
        """Raises UsageError, TeacherError or InputError for what is not there or cannot work."""
        backend = open_backend(options)
        config = backend.config()
        tokenizer = load_tokenizer(backend.info.path)
        rows = open_source(options.data, split=options.split)
        inputs = _input_config(options, backend.info)
        builder = SampleBuilder(tokenizer, inputs, rows.name, locate=rows.locate)
        return cls(
            options=options,
            config=config,
            backend=backend,
            tokenizer=tokenizer,
            source=DumpSource(rows, builder, config.score),
        )

    def open_store(
        self, folder: Folder, *, source: DumpSource | None = None, quiet: bool = False
    ) -> StoreWriter:
        """The store that these options describe, planned if it is new; see ``open_dump``.

        ``source`` is read for the plan instead of ``self.source``.
        """
        return open_dump(
            folder,
            source or self.source,
            teacher=self.backend.info.identity,
            vocab_size=self.backend.info.vocab_size,
            tokenizer=self.tokenizer,
            config=self.config,
            quiet=quiet,
        )

    def load_teacher(self) -> Teacher:
        """The teacher, ready to score. Warns of ids that it has no logits for."""
        return self.backend.load(num_ids=_num_ids(self.tokenizer, self.backend.info))


def scalar_names(names: Iterable[str]) -> tuple[str, ...]:
    """Scalars that a teacher can give, each once; UsageError for a name that none has."""
    plain = {*DEFAULT_SCALARS, "lse"}
    known = (n if n in plain else f"{LSE_T_PREFIX}{temperature_of(n)}" for n in names)
    return tuple(dict.fromkeys(known))


def _num_ids(tokenizer: Any, info: CheckpointInfo) -> int:
    """How many ids the tokenizer has, up to the logits' width; a wider one is warned of."""
    num_ids = len(TokenTable.from_tokenizer(tokenizer))
    if num_ids > info.vocab_size:
        print(
            f"kdstore: warning: the tokenizer has {num_ids} ids, the teacher's logits only "
            f"{info.vocab_size}; ids beyond cannot be scored and are refused where they occur",
            file=sys.stderr,
        )
    return min(num_ids, info.vocab_size)


def _input_config(options: ScoringOptions, info: CheckpointInfo) -> InputConfig:
    return InputConfig(
        max_length=_max_length(options.max_length, info),
        overlong=options.overlong,
        add_bos=options.add_bos,
        add_eos=options.add_eos,
        keep_text=options.keep_text,
        template_date=options.template_date,
        template_options=options.template_options,
    )


def _max_length(wanted: int | None, info: CheckpointInfo) -> int | None:
    if wanted is not None and info.max_length is not None and wanted > info.max_length:
        raise UsageError(
            "max_length is more than the teacher takes",
            where=info.path,
            expected=f"at most {info.max_length}",
            got=wanted,
        )
    return wanted or info.max_length
