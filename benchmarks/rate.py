"""Bytes per scored position of each selection, and what they buy: variance, or KL.

    scripts/bench rate --teacher PATH --texts FILE.jsonl [--quick]

A store is made of the texts for every selection, as ``kdstore dump`` makes it, and read back. Bytes
are those of its shards without token ids and scalars: footers, sample ids and row hashes count.
Variance and KL are those of what was read. The id order is made of the same texts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

import kdstore
from benchmarks.figures import machine, print_figure
from benchmarks.scored import (
    QUICK_POSITIONS,
    SELECTIONS,
    Scored,
    kl_of_rounding,
    read_texts,
    score,
    squared_distance,
)
from kdstore.filesystem import Folder
from kdstore.inputs import InputConfig, SampleBuilder, open_source
from kdstore.layout import signal_column
from kdstore.readers.stats import store_stats
from kdstore.sample import Sample
from kdstore.select import DEFAULT_SCALARS, Selection
from kdstore.signal import SparseSignal
from kdstore.teacher import Score, Teacher
from kdstore.teachers.hf_load import describe_checkpoint, load_tokenizer
from kdstore.writers.dump import DumpConfig, DumpSource, open_dump
from kdstore.writers.run import run_units

ROUNDS = {"rs50": 50, "rs13": 13}
SQUARES = "sum of squares per position"
BYTES = "bytes per position"


class Replay(Teacher):
    """A teacher that answers with signals that are there already."""

    def __init__(self, scored: Scored, name: str) -> None:
        self.vocab_size = scored.vocab_size
        splits = scored.positions.splits
        self._signals = {
            text.sample_id: scored.signals[name][splits[row] : splits[row + 1]]
            for row, text in enumerate(scored.texts)
        }

    def score(
        self, samples: Sequence[Sample], selection: Selection, **options: Any
    ) -> Iterator[Score]:
        """The signal of each sample."""
        del options
        for sample in samples:
            signal = self._signals[sample.sample_id]
            yield Score(sample.sample_id, signal, SparseSignal.empty("full"))

    def provenance(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def write_store(teacher: str, scored: Scored, name: str, folder: Path) -> kdstore.Store:
    """The store that a dump of the texts with the named selection gives."""
    data = folder / "texts.jsonl"
    rows = [{"id": text.sample_id, "input_ids": text.ids_T.tolist()} for text in scored.texts]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rows_source = open_source(data)
    info, tokenizer = describe_checkpoint(teacher, device="cpu"), load_tokenizer(Path(teacher))
    builder = SampleBuilder(tokenizer, InputConfig(), rows_source.name, locate=rows_source.locate)
    config = DumpConfig(selection=SELECTIONS[name], score="all")
    source = DumpSource(rows_source, builder, config.score)
    url = str(folder / name)
    writer = open_dump(
        Folder(url),
        source,
        teacher=info.identity,
        vocab_size=scored.vocab_size,
        tokenizer=tokenizer,
        config=config,
        quiet=True,
    )
    planned = [writer.plan.unit(unit) for unit in writer.pending_units()]
    run_units(writer, Replay(scored, name), source, planned, quiet=True)
    writer.seal()
    return kdstore.open(url)


def read_signal(store: kdstore.Store) -> SparseSignal:
    """The decoded signal of all samples of a store, in order."""
    return SparseSignal.concat([sample.signal for sample in store if sample.signal is not None])


def fidelity(scored: Scored, name: str, decoded: SparseSignal) -> Iterator[tuple[str, float, str]]:
    """(figure, value, unit) of what a reader gets of one selection."""
    signal = scored.signals[name]
    if name in ("topk50", "topp95"):
        yield f"rate.{name}.kl", kl_of_rounding(signal, decoded), "nats"
        return
    sampled, rounded = scored.variance(name, signal), squared_distance(signal, decoded)
    yield f"rate.{name}.variance", scored.variance(name, decoded), SQUARES
    yield f"rate.{name}.selection_variance", sampled, SQUARES
    yield f"rate.{name}.rounding_share", rounded / sampled, "of the selection's variance"


def report(teacher: str, scored: Scored) -> Iterator[tuple[str, float, str]]:
    """(figure, value, unit) of everything."""
    scalars = tuple(signal_column("main", name) for name in DEFAULT_SCALARS)
    for name in SELECTIONS:
        with tempfile.TemporaryDirectory(prefix="rate-") as folder:
            store = write_store(teacher, scored, name, Path(folder))
            stats, order = store_stats(store), (Path(folder) / name / "idorder.arrow").stat()
            decoded = read_signal(store)
        size = stats["bytes_per_position"]
        yield f"rate.{name}.bytes", size["total"] - size["input_ids"] - size["scalars"], BYTES
        yield f"rate.{name}.entries", stats["entries_per_position"], "entries per position"
        prefix = signal_column("main", "")
        for column, plane in size["columns"].items():
            if column.startswith(prefix) and not column.startswith(scalars):
                yield f"rate.{name}.bytes.{column.removeprefix(prefix)}", plane, BYTES
        yield f"rate.{name}.bytes.other", size["other"], BYTES
        yield from fidelity(scored, name, decoded)
    yield "rate.scalars.bytes", size["scalars"], BYTES
    yield "rate.input_ids.bytes", size["input_ids"], BYTES
    for name, rounds in ROUNDS.items():
        yield f"rate.{name}.variance", scored.rounds_variance(rounds), SQUARES
    yield "rate.order.bytes", order.st_size, "bytes of the store"


@click.command()
@click.option("--teacher", required=True, help="Folder of a causal language model.")
@click.option("--texts", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--positions", type=int, help="About so many instead of those of all texts.")
@click.option("--quick", is_flag=True, help=f"{QUICK_POSITIONS:,} positions.")
def main(teacher: str, texts: Path, positions: int | None, quick: bool) -> None:
    """Print a JSON line for each figure."""
    samples = read_texts(teacher, texts, positions=QUICK_POSITIONS if quick else positions)
    scored = score(teacher, samples)
    about = {
        "positions": len(scored.squares_S),
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
    for figure, value, unit in report(teacher, scored):
        print_figure(figure, value, unit, **about)


if __name__ == "__main__":
    main()
