"""How fast the codecs are on one core, next to zstd's own share and to DistillKit's layout.

    scripts/bench codec --teacher PATH --texts FILE.jsonl [--quick]

Signals are a teacher's, encoded and decoded a row group at a time. Decoding starts from compressed
planes in memory and ends at CSR arrays. What is compared is timed in turns, so that a busy machine
slows both; figures are medians over the rounds, ratios those of the rounds' ratios.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from numpy.typing import NDArray

from benchmarks import distillkit_layout
from benchmarks.figures import machine, print_figure
from benchmarks.scored import SELECTIONS, Scored, read_texts, score
from kdstore.codecs import Positions, SignalCodec, codec_for
from kdstore.codecs.planes import Memory, Plane, Planes
from kdstore.hashing import RowKeys
from kdstore.signal import SparseSignal

ROW_GROUP = 64
_FIRST_USE = """
import time
import numpy as np
from kdstore.codecs import IdOrder, Positions, codec_for
from kdstore.hashing import RowKeys
from kdstore.signal import SparseSignal

started, spec = time.perf_counter(), "pps:tau=0.5"
codec = codec_for(spec, order=IdOrder.identity(10), scalars=())
signal = SparseSignal.from_arrays(spec, [0, 1], [3], [0.0], tail_N=[False])
keys = RowKeys.of_samples([("sample", np.arange(1, 2))], seed=0)
previous = np.zeros(1, dtype=np.int32)
codec.decode(codec.encode(signal, Positions(keys, np.array([0, 1]), previous)), previous)
print(time.perf_counter() - started)
"""


@dataclass(frozen=True, eq=False)
class Group:
    """One row group of samples: its signal, its planes, and each plane compressed."""

    signal: SparseSignal
    positions: Positions
    planes: dict[str, Plane]
    frames: dict[str, bytes]


def row_groups(scored: Scored, name: str, codec: SignalCodec) -> list[Group]:
    """The signal of a selection in groups of 64 samples."""
    whole, groups = scored.positions, []
    for first in range(0, len(whole.splits) - 1, ROW_GROUP):
        splits = whole.splits[first : first + ROW_GROUP + 1]
        rows = slice(int(splits[0]), int(splits[-1]))
        keys = RowKeys(0, whole.keys.sample_hash_S[rows], whole.keys.position_S[rows])
        positions = Positions(keys, splits - splits[0], whole.previous_S[rows])
        signal = scored.signals[name][rows]
        planes = codec.encode(signal, positions)
        frames = {
            plane: zstandard.ZstdCompressor(level=codec.compression_level(plane)).compress(
                data.data.tobytes()
            )
            for plane, data in planes.items()
        }
        groups.append(Group(signal, positions, planes, frames))
    return groups


def decompress(group: Group) -> dict[str, bytes]:
    """zstd's share of decoding."""
    zstd = zstandard.ZstdDecompressor()
    return {name: zstd.decompress(frame) for name, frame in group.frames.items()}


def decode(codec: SignalCodec, group: Group, memory: Memory | None = None) -> SparseSignal:
    """From compressed planes to CSR arrays, in fresh memory or in memory that is used again."""
    planes = {
        name: Plane(np.frombuffer(data, np.uint8), group.planes[name].offsets)
        for name, data in decompress(group).items()
    }
    return codec.decode(planes, group.positions.previous_S, memory=memory)


def least_work(codec: SignalCodec, group: Group) -> Callable[[], object]:
    """What no decoder can do without: a lookup and a place in order for each entry."""
    signal = group.signal
    ranks = codec.order.rank_of_V[signal.ids_N].astype(np.int64)
    width = int(np.ceil(signal.num_entries / max(len(signal), 1)))
    some = np.random.default_rng(0).integers(0, codec.order.vocab_size, (len(signal), width))

    def work() -> object:
        return codec.order.id_of_V[ranks], np.sort(some.astype(np.int32), axis=1)

    return work


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(ways: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, NDArray[Any]]:
    """Seconds of each way, round by round; the first round warms up."""
    times = [[seconds(way) for way in ways.values()] for _ in range(rounds + 1)]
    return dict(zip(ways, np.array(times[1:]).T, strict=True))


def codec_figures(scored: Scored, name: str, *, rounds: int) -> Iterator[tuple[str, float, str]]:
    """(figure, value, unit) of one selection's codec, without scalars."""
    signal = scored.signals[name]
    codec = codec_for(signal.selection, order=scored.order(), scalars=())
    groups, S = row_groups(scored, name, codec), len(signal)
    least = [least_work(codec, group) for group in groups]
    pool, memory = ThreadPoolExecutor(2), Memory()
    ways: dict[str, Callable[[], object]] = {
        "zstd": lambda: [decompress(group) for group in groups],
        "decode": lambda: [decode(codec, group, memory) for group in groups],
        "fresh": lambda: [decode(codec, group) for group in groups],
        "least": lambda: [work() for work in least],
        "threads": lambda: list(pool.map(lambda group: decode(codec, group), groups * 2)),
        "encode": lambda: [codec.encode(group.signal, group.positions) for group in groups],
    }
    times = in_turns({way: ways[way] for way in ("zstd", "decode", "fresh")}, rounds=rounds)
    others = in_turns({way: ways[way] for way in ("zstd", "least")}, rounds=rounds)
    pairs = in_turns({way: ways[way] for way in ("fresh", "threads")}, rounds=rounds)
    times |= in_turns({"encode": ways["encode"]}, rounds=rounds)
    short = {"pps06": "pps"}.get(name, name)
    speeds = {way: S / np.median(taken) for way, taken in times.items()}
    yield f"codec.decode.{short}.positions_per_s", speeds["decode"], "positions/s"
    yield f"codec.decode.{short}.fresh_memory.positions_per_s", speeds["fresh"], "positions/s"
    over = np.median(times["decode"] / times["zstd"])
    yield f"codec.decode.{short}.over_zstd", over, "times zstd's share"
    bound = np.median((others["zstd"] + others["least"]) / others["zstd"])
    yield f"codec.decode.{short}.least_over_zstd", bound, "times zstd's share"
    scaling = np.median(2 * pairs["fresh"] / pairs["threads"])
    yield f"codec.decode.{short}.two_threads", scaling, "times one thread's speed"
    yield f"codec.zstd.{short}.positions_per_s", speeds["zstd"], "positions/s"
    yield f"codec.encode.{short}.positions_per_s", speeds["encode"], "positions/s"


def compile_seconds() -> float:
    """Time of the first encoding and decoding where nothing is compiled yet."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        program = [sys.executable, "-c", _FIRST_USE]
        ran = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    return float(ran.stdout)


def parquet(codec: SignalCodec, planes: Planes) -> bytes:
    """A file of the planes, as shards hold them."""
    columns = {
        name: pa.Array.from_buffers(
            pa.large_binary(),
            len(plane.offsets) - 1,
            [None, pa.py_buffer(plane.offsets.astype("<i8")), pa.py_buffer(plane.data)],
        )
        for name, plane in planes.items()
    }
    levels = {name: codec.compression_level(name) for name in planes}
    sink = io.BytesIO()
    options = {"compression": "zstd", "compression_level": levels, "use_dictionary": False}
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def read_parquet(codec: SignalCodec, data: bytes, previous_S: NDArray[np.int32]) -> SparseSignal:
    """From a file of planes to CSR arrays."""
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    planes = {}
    for name in table.column_names:
        cells = table[name].combine_chunks()
        offsets = np.frombuffer(cells.buffers()[1], "<i8")[: len(cells) + 1]
        planes[name] = Plane(np.frombuffer(cells.buffers()[2], np.uint8), offsets)
    return codec.decode(planes, previous_S)


def kl_of_kept(signal: SparseSignal, logprobs_SK: NDArray[np.float32]) -> float:
    """Mean KL of stored to read entries, both scaled to a sum of one."""
    p, q = (
        values - np.logaddexp.reduce(values, axis=1, keepdims=True)
        for values in (
            signal.logprobs_N.reshape(logprobs_SK.shape).astype(np.float64),
            logprobs_SK.astype(np.float64),
        )
    )
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def distillkit_figures(scored: Scored, *, rounds: int) -> Iterator[tuple[str, float, str]]:
    """The same top 50 in DistillKit's layout, both from a file in memory to arrays and back."""
    signal, positions, S = scored.signals["topk50"], scored.positions, len(scored.squares_S)
    codec = codec_for(signal.selection, order=scored.order(), scalars=())
    theirs = distillkit_layout.write(signal, positions.splits)
    ours = parquet(codec, codec.encode(signal, positions))
    times = in_turns(
        {
            "write": lambda: parquet(codec, codec.encode(signal, positions)),
            "distillkit.write": lambda: distillkit_layout.write(signal, positions.splits),
            "read": lambda: read_parquet(codec, ours, positions.previous_S),
            "distillkit.read": lambda: distillkit_layout.read(theirs),
        },
        rounds=rounds,
    )
    decoded = read_parquet(codec, ours, positions.previous_S).logprobs_N.reshape(S, -1)
    ids, logprobs = distillkit_layout.read(theirs)
    by_id = np.take_along_axis(logprobs, np.argsort(ids, axis=1), 1)
    yield "codec.file.topk50.kl", kl_of_kept(signal, decoded), "nats, entries sum to one"
    yield "codec.file.distillkit.kl", kl_of_kept(signal, by_id), "nats, entries sum to one"
    yield "codec.file.topk50.bytes", len(ours) / S, "bytes per position"
    yield "codec.file.distillkit.bytes", len(theirs) / S, "bytes per position"
    for way in ("write", "read"):
        ratio = np.median(times[f"distillkit.{way}"] / times[way])
        yield f"codec.file.{way}.speed_over_distillkit", ratio, "times as fast"
        speed = S / np.median(times[f"distillkit.{way}"])
        yield f"codec.file.{way}.distillkit.positions_per_s", speed, "positions/s"


@click.command()
@click.option("--teacher", required=True, help="Folder of a causal language model.")
@click.option("--texts", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--positions", default=66_000, show_default=True)
@click.option("--quick", is_flag=True, help="8,000 positions, 5 rounds.")
def main(teacher: str, texts: Path, positions: int, quick: bool) -> None:
    """Print a JSON line for each figure."""
    rounds = 5 if quick else 25
    scored = score(teacher, read_texts(teacher, texts, positions=8_000 if quick else positions))
    about = {"positions": len(scored.squares_S), "rounds": rounds, "machine": machine()}
    for name in SELECTIONS:
        for figure, value, unit in codec_figures(scored, name, rounds=rounds):
            print_figure(figure, float(value), unit, **about)
    print_figure("codec.compile.pps.seconds", compile_seconds(), "seconds", **about)
    for figure, value, unit in distillkit_figures(scored, rounds=max(3, rounds // 5)):
        print_figure(figure, float(value), unit, **about)


if __name__ == "__main__":
    main()
