"""What a dump is: its settings, its source, and the store they open. ``run`` does the work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdstore.align import TokenTable, tokenizer_digest, tokenizer_files
from kdstore.codecs.registry import codec_name_for
from kdstore.codecs.rows import PLAIN_COLUMNS
from kdstore.filesystem import Folder
from kdstore.inputs import Row, SampleBuilder, Source
from kdstore.layout import MAIN_SIGNAL
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

    ``unit_tokens`` is the least number of tokens of a unit but the last; a unit is one shard, what
    a crash can lose, and what is held in memory. None: what ``default_unit_tokens`` says.
    """

    selection: str = DEFAULT_SELECTION
    scalars: tuple[str, ...] = DEFAULT_SCALARS
    score: ScoreRule = "supervised"
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
                source.samples(),
                unit_tokens=identity["unit_tokens"],
                vocab_size=vocab_size,
                where=source.rows.location,
                on_row=progress.advance,
            )
        return NewPlan(*made, source.builder.counters.to_dict())

    files = {**tokenizer_files(tokenizer), CONFIG_FILE: tokenizer_config(tokenizer)}
    return StoreWriter.open(folder, identity, make_plan=plan, tokenizer_files=files)


def default_unit_tokens(selection: Selection, vocab_size: int) -> int:
    """4 Mi tokens, or fewer where a selection keeps so much that a unit would not fit in memory."""
    return min(MAX_UNIT_TOKENS, max(1, MAX_UNIT_ENTRIES // selection.typical_entries(vocab_size)))


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
    signal = {
        "selection": selection.spec,
        "codec": codec_name_for(selection.spec),
        "scalars": list(config.scalars),
        "scored": config.score,
    }
    keep_text = source.builder.config.keep_text
    return {
        "teacher": teacher,
        "vocab_size": vocab_size,
        "vocab_digest": TokenTable.from_tokenizer(tokenizer).fingerprint(),
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "tokenization": source.builder.policy(),
        "input": source.builder.config.to_dict(),
        "signals": {MAIN_SIGNAL: signal},
        "source": source.rows.fingerprint(),
        "unit_tokens": config.unit_tokens or default_unit_tokens(selection, vocab_size),
        "columns": [name for name in PLAIN_COLUMNS if keep_text or name not in _TEXT_COLUMNS],
        "seed": config.seed,
    }
