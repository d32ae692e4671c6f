"""Bytes per scored position of each selection, and what they buy: variance, or KL.

    scripts/bench rate --teacher PATH --texts FILE.jsonl [--quick]

Texts are cut at 512 tokens; the id order is made of the texts that are scored, as a dump makes it.
Bytes are those of a Parquet file of the signal's columns, its footer included.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from figures import machine, print_figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdstore.codecs import IdOrder, Positions, SignalCodec, codec_for
from kdstore.codecs.counting import OrderBuilder
from kdstore.hashing import RowKeys
from kdstore.select import DEFAULT_SCALARS, parse_selection, select
from kdstore.signal import SparseSignal, segment_sum

MAX_LENGTH = 512
SELECTIONS = {
    "pps06": "pps:tau=0.06",
    "pps16": "pps:tau=0.16",
    "counts50": "counts:n=50",
    "topk50": "topk:k=50",
    "topp95": "topp:p=0.95,max_k=100",
}
ROUNDS = {"rs50": 50, "rs13": 13}


class Scored:
    """Signals of all selections over the texts, and the dense sums that figures need."""

    def __init__(self, order: IdOrder) -> None:
        self.order = order
        self.parts: dict[str, list[SparseSignal]] = {name: [] for name in SELECTIONS}
        self.positions: list[Positions] = []
        self.squares = 0.0
        self.errors = dict.fromkeys(SELECTIONS, 0.0)

    def add(self, sample_id: str, ids: torch.Tensor, logits_SV: torch.Tensor) -> None:
        """Select from one text's logits, and compare what decodes with the dense distribution."""
        S = len(logits_SV)
        keys = RowKeys.of_samples([(sample_id, np.arange(1, S + 1))], seed=0)
        previous = ids[:-1].numpy().astype(np.int32)
        positions = Positions(keys, np.array([0, S]), previous)
        self.positions.append(positions)
        dense = logits_SV.double().softmax(-1).numpy()
        self.squares += float((dense**2).sum())
        for name, spec in SELECTIONS.items():
            signal = select(logits_SV, ids[1:], selection=parse_selection(spec), keys=keys)
            self.parts[name].append(signal)
            codec = codec_for(signal.selection, order=self.order, scalars=())
            if name.startswith(("pps", "counts")):
                decoded = codec.decode(codec.encode(signal, positions), previous)
                self.errors[name] += float(((decoded.to_dense(dense.shape[1]) - dense) ** 2).sum())

    @property
    def num_scored(self) -> int:
        """Positions scored so far."""
        return sum(len(positions.previous_S) for positions in self.positions)


def read_texts(teacher: str, texts: Path, *, positions: int) -> list[tuple[str, list[int]]]:
    """(id, token ids) of every second text, until there are enough positions."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = [json.loads(line) for line in texts.read_text().splitlines()][::2]
    found, total = [], 0
    for row in rows:
        ids = tokenizer(row["text"])["input_ids"][:MAX_LENGTH]
        if len(ids) > 1 and total < positions:
            found.append((str(row["id"]), ids))
            total += len(ids) - 1
    return found


def score(teacher: str, samples: list[tuple[str, list[int]]]) -> Scored:
    """All selections of all samples."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    builder = OrderBuilder(model.config.vocab_size)
    for _, ids in samples:
        builder.add(np.array(ids))
    scored = Scored(builder.build())
    for sample_id, ids in samples:
        tokens = torch.tensor(ids)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1]
        scored.add(sample_id, tokens, logits)
    return scored


def column_bytes(codec: SignalCodec, planes: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Bytes of a Parquet file of the planes, and compressed bytes by plane."""
    arrays = {
        name: pa.Array.from_buffers(
            pa.large_binary(),
            len(plane.offsets) - 1,
            [None, pa.py_buffer(plane.offsets.astype("<i8")), pa.py_buffer(plane.data)],
        )
        for name, plane in planes.items()
    }
    sink = io.BytesIO()
    pq.write_table(
        pa.table(arrays),
        sink,
        compression="zstd",
        compression_level={name: codec.compression_level(name) for name in planes},
        use_dictionary=False,
        write_statistics=False,
        write_page_index=True,
        write_page_checksum=True,
    )
    group = pq.ParquetFile(sink).metadata.row_group(0)
    sizes = [group.column(index) for index in range(group.num_columns)]
    by_plane = {column.path_in_schema: column.total_compressed_size for column in sizes}
    return len(sink.getvalue()), by_plane


def kl_of_quantisation(signal: SparseSignal, decoded: SparseSignal) -> float:
    """Mean KL, in nats, of entries and rest before rounding to entries and rest after it."""
    entries = np.exp(signal.logprobs_N.astype(np.float64))
    rest = np.exp(signal.rest_S.astype(np.float64))
    total = segment_sum(entries, signal.indptr) + rest
    entries, rest = entries / total[signal.rows_N], rest / total
    terms = segment_sum(entries * (np.log(entries) - decoded.logprobs_N), signal.indptr)
    some = rest > 0
    terms[some] += rest[some] * (np.log(rest[some]) - decoded.rest_S[some])
    return float(terms.mean())


def joined(positions: list[Positions]) -> Positions:
    """The positions of all samples, one after the other."""
    hashes = np.concatenate([p.keys.sample_hash_S for p in positions])
    places = np.concatenate([p.keys.position_S for p in positions])
    splits = np.cumsum([0, *(len(p.previous_S) for p in positions)])
    previous = np.concatenate([p.previous_S for p in positions])
    return Positions(RowKeys(0, hashes, places), splits, previous)


def report(scored: Scored) -> Iterator[tuple[str, float, str]]:
    """(figure, value, unit) of everything."""
    positions, S = joined(scored.positions), scored.num_scored
    for name, spec in SELECTIONS.items():
        signal = SparseSignal.concat(scored.parts[name])
        codec = codec_for(parse_selection(spec).spec, order=scored.order, scalars=DEFAULT_SCALARS)
        planes = codec.encode(signal, positions)
        entry_planes = {plane: planes[plane] for plane in codec.entry_planes}
        total, by_plane = column_bytes(codec, entry_planes)
        yield f"rate.{name}.bytes", total / S, "bytes per position"
        yield f"rate.{name}.entries", signal.num_entries / S, "entries per position"
        for plane, size in by_plane.items():
            yield f"rate.{name}.bytes.{plane}", size / S, "bytes per position"
        if name in ("topk50", "topp95"):
            decoded = codec.decode(planes, positions.previous_S)
            yield f"rate.{name}.kl", kl_of_quantisation(signal, decoded), "nats"
        else:
            yield f"rate.{name}.variance", scored.errors[name] / S, "sum of squares per position"
    rest = {plane: data for plane, data in planes.items() if plane not in entry_planes}
    yield "rate.scalars.bytes", column_bytes(codec, rest)[0] / S, "bytes per position"
    for name, rounds in ROUNDS.items():
        yield f"rate.{name}.variance", (S - scored.squares) / S / rounds, "sum of squares"
    yield "rate.order.bytes", len(scored.order.to_bytes()), "bytes of the store"


@click.command()
@click.option("--teacher", required=True, help="Folder of a causal language model.")
@click.option("--texts", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--positions", default=66_000, show_default=True)
@click.option("--quick", is_flag=True, help="8,000 positions.")
def main(teacher: str, texts: Path, positions: int, quick: bool) -> None:
    """Print a JSON line for each figure."""
    samples = read_texts(teacher, texts, positions=8_000 if quick else positions)
    scored = score(teacher, samples)
    about = {"positions": scored.num_scored, **machine()}
    for figure, value, unit in report(scored):
        print_figure(figure, value, unit, **about)


if __name__ == "__main__":
    main()
