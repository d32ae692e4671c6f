"""What a dump is: its settings, its source, and the store they open. ``run`` does the work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdstore.align import TokenTable, tokenizer_digest, tokenizer_files
from kdstore.audit import AUDIT_SELECTION, audit_runs
from kdstore.codecs.registry import codec_name_for
from kdstore.codecs.rows import PLAIN_COLUMNS
from kdstore.errors import UsageError
from kdstore.filesystem import Folder
from kdstore.inputs import Row, SampleBuilder, Source
from kdstore.layout import AUDIT_SIGNAL, MAIN_SIGNAL
from kdstore.progress import Progress
from kdstore.sample import Sample, ScoreRule
from kdstore.select import DEFAULT_SCALARS, DEFAULT_SELECTION, Selection, parse_selection
from kdstore.writers.plan import make_plan
from kdstore.writers.store import NewPlan, StoreWriter

MAX_UNIT_TOKENS = 1 << 22
MAX_UNIT_ENTRIES = 1 << 27  # 1 GB of ids and log-probabilities
CONFIG_FILE = "tokenizer_config.json"
_TEXT_COLUMNS = ("text", "messages")


@dataclass(frozen=True)
class DumpConfig:
    """What is stored: selection and scalars, where, and how the work is cut.

    ``audit_fraction`` of the scored positions also keep the teacher's full distribution.
    ``unit_tokens`` is the least number of tokens of a unit but the last; a unit is one shard, what
    a crash can lose, and what is held in memory. None: what ``default_unit_tokens`` says.
    """

    selection: str = DEFAULT_SELECTION
    scalars: tuple[str, ...] = DEFAULT_SCALARS
    score: ScoreRule = "supervised"
    audit_fraction: float = 0.0
    unit_tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class DumpSource:
    """Where samples come from: rows, and how they become tokens."""

    rows: Source
    builder: SampleBuilder
    score: ScoreRule

    def samples(self) -> Iterator[tuple[int, list[Sample]]]:
        """(source row, its samples) of all rows."""
        for row, content in self.rows.rows():
            yield row, self.build(row, content)

    def build(self, row: int, content: Row) -> list[Sample]:
        """The samples of one source row, their scored positions set."""
        samples = self.builder.samples(row, content)
        return [sample.with_score_rule(self.score) for sample in samples]


def open_dump(
    folder: Folder,
    source: DumpSource,
    *,
    teacher: dict[str, Any],
    vocab_size: int,
    tokenizer: Any,
    config: DumpConfig,
    quiet: bool = False,
) -> StoreWriter:
    """The store of a dump, planned if it is new, resumed if it exists.

    ``teacher`` is the teacher's part of the identity, ``vocab_size`` the width of its logits.
    Raises InputError, StoreMismatchError, UsageError and HeaderError, as planning and resuming do.
    """
    identity = build_identity(source, teacher, vocab_size, tokenizer, config)

    def plan() -> NewPlan:
        with Progress("plan", total=None, unit="rows", quiet=quiet) as progress:
            made = make_plan(
                _audit_checked(source, config, vocab_size),
                unit_tokens=identity["unit_tokens"],
                vocab_size=vocab_size,
                where=source.rows.location,
                on_row=progress.advance,
            )
        return NewPlan(*made, source.builder.counters.to_dict())

    files = {**tokenizer_files(tokenizer), CONFIG_FILE: tokenizer_config(tokenizer)}
    return StoreWriter.open(folder, identity, make_plan=plan, tokenizer_files=files)


def default_unit_tokens(
    selection: Selection, vocab_size: int, *, audit_fraction: float = 0.0
) -> int:
    """4 Mi tokens, or fewer where so much is kept that a unit would not fit in memory."""
    entries = selection.typical_entries(vocab_size) + audit_fraction * vocab_size
    return min(MAX_UNIT_TOKENS, max(1, int(MAX_UNIT_ENTRIES // entries)))


def tokenizer_config(tokenizer: Any) -> bytes:
    """``tokenizer_config.json`` as save_pretrained writes it: what loading the tokenizer needs."""
    with tempfile.TemporaryDirectory(prefix="kdstore-") as folder:
        tokenizer.save_pretrained(folder)
        return (Path(folder) / CONFIG_FILE).read_bytes()


def build_identity(
    source: DumpSource,
    teacher: dict[str, Any],
    vocab_size: int,
    tokenizer: Any,
    config: DumpConfig,
) -> dict[str, Any]:
    """What the signals of a dump are, without the digests of plan and id order."""
    selection = parse_selection(config.selection)
    default = default_unit_tokens(selection, vocab_size, audit_fraction=config.audit_fraction)
    keep_text = source.builder.config.keep_text
    return {
        "teacher": teacher,
        "vocab_size": vocab_size,
        "vocab_digest": TokenTable.from_tokenizer(tokenizer).fingerprint(),
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "tokenization": source.builder.policy(),
        "input": source.builder.config.to_dict(),
        "signals": _signals(selection, config),
        "source": source.rows.fingerprint(),
        "unit_tokens": config.unit_tokens or default,
        "columns": [name for name in PLAIN_COLUMNS if keep_text or name not in _TEXT_COLUMNS],
        "seed": config.seed,
    }


def _signals(selection: Selection, config: DumpConfig) -> dict[str, Any]:
    """What the identity says of each signal."""
    main = {
        "selection": selection.spec,
        "codec": codec_name_for(selection.spec),
        "scalars": list(config.scalars),
        "scored": config.score,
    }
    audit = {
        "selection": AUDIT_SELECTION,
        "codec": codec_name_for(AUDIT_SELECTION),
        "scalars": [],
        "fraction": float(config.audit_fraction),
    }
    return {MAIN_SIGNAL: main, **({AUDIT_SIGNAL: audit} if config.audit_fraction else {})}


def _audit_checked(
    source: DumpSource, config: DumpConfig, vocab_size: int
) -> Iterator[tuple[int, list[Sample]]]:
    """The source's samples; UsageError for one whose audit would not fit in memory, or a cell."""
    limit = MAX_UNIT_ENTRIES // vocab_size
    for row, samples in source.samples():
        for sample in samples:
            if config.audit_fraction and sample.num_scored > limit:
                _check_audit(sample, config, limit=limit)
        yield row, samples


def _check_audit(sample: Sample, config: DumpConfig, *, limit: int) -> None:
    runs = audit_runs(sample, fraction=config.audit_fraction, seed=config.seed)
    audited = sum(end - start for start, end in runs)
    if audited > limit:
        raise UsageError(
            "too many positions of one sample would be audited",
            where=f"sample {sample.sample_id!r}",
            expected=f"at most {limit} of {sample.num_scored} scored positions",
            got=f"{audited} with --audit-fraction {config.audit_fraction}",
            todo="lower --audit-fraction, or split samples with --max-length",
        )
