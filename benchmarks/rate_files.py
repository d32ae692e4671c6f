"""Variants of files: zstd levels, dictionaries, row groups, encodings, and pcodec instead."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import zstandard

from benchmarks.scored import Scored
from benchmarks.streams import Row, dictionary_of, group_frames, parquet_bytes, zstd_bytes
from kdstore.codecs import IdOrder, Plane, codec_for
from kdstore.codecs.shorts import decode_shorts
from kdstore.errors import MissingDependencyError

LEVELS = (1, 3, 6, 9, 19)
LONG_WINDOW = 27
GROUPS = (4, 16, 64)
DICTIONARY_BYTES = 16 << 10


class Files:
    """Planes of every selection, as its codec makes them, and the levels that it asks for."""

    def __init__(self, scored: Scored, order: IdOrder) -> None:
        self.S, positions = len(scored.squares_S), scored.positions
        self.planes: dict[str, dict[str, Plane]] = {}
        self.levels: dict[str, dict[str, int]] = {}
        for name, signal in scored.signals.items():
            codec = codec_for(signal.selection, order=order, scalars=())
            self.planes[name] = codec.encode(signal, positions)
            self.levels[name] = {n: codec.compression_level(n) for n in self.planes[name]}

    @property
    def bytes_per_tail_id(self) -> float:
        """What an id of a tail costs."""
        tail, extra = (self.planes["pps06"][plane].data for plane in ("tail", "tail/extra"))
        return (zstd_bytes(tail.tobytes()) + zstd_bytes(extra.tobytes())) / len(tail)


def zstd_levels(files: Files) -> Iterator[Row]:
    """All planes, and those of ids alone, at several levels and with a window of 128 MB."""
    for name, planes in files.planes.items():
        every, ids = _frames(planes), _frames(planes, only=("top", "head", "tail", "id"))
        found = {}
        for level in LEVELS:
            started_s = time.perf_counter()
            found[f"level_{level}"] = _size(every, level=level) / files.S
            taken_s = time.perf_counter() - started_s
            found[f"level_{level}_ns"] = taken_s / files.S * 1e9
        found["level_19_long"] = _size(every, level=19, window_log=LONG_WINDOW) / files.S
        yield f"{name}.zstd", found
        if name.startswith("top"):
            sizes = {f"level_{level}": _size(ids, level=level) for level in LEVELS}
            yield f"{name}.zstd.id", {key: size / files.S for key, size in sizes.items()}


def _frames(planes: dict[str, Plane], *, only: tuple[str, ...] = ()) -> list[bytes]:
    chosen = (p for n, p in planes.items() if not only or n.partition("/")[0] in only)
    return [plane.data.tobytes() for plane in chosen]


def _size(frames: list[bytes], *, level: int, window_log: int | None = None) -> int:
    return sum(zstd_bytes(frame, level=level, window_log=window_log) for frame in frames)


def row_groups(files: Files) -> Iterator[Row]:
    """Parquet files by samples in a row group, and with the lengths of cells delta-coded."""
    for name, planes in files.planes.items():
        samples = len(planes[next(iter(planes))].offsets) - 1
        for group in (*GROUPS, samples):
            plain = parquet_bytes(planes, files.levels[name], samples_per_group=group)
            delta = parquet_bytes(
                planes,
                files.levels[name],
                samples_per_group=group,
                encoding="DELTA_LENGTH_BYTE_ARRAY",
            )
            found = {
                "positions_per_group": files.S * group / samples,
                "bytes": plain / files.S,
                "bytes_delta_length": delta / files.S,
            }
            yield f"{name}.row_group.{'all' if group == samples else group}_samples", found


def dictionaries(files: Files) -> Iterator[Row]:
    """Frames of few samples with and without a dictionary trained on other samples.

    Trained on the first half of the frames of each plane, measured on the other half.
    """
    for name in ("pps06", "counts50", "topk50"):
        for group in GROUPS:
            plain, trained, learned, positions = 0, 0, 0, 0
            for plane_name, plane in files.planes[name].items():
                frames = group_frames(plane, group)
                half = len(frames) // 2
                dictionary = dictionary_of(frames[:half], size=DICTIONARY_BYTES)
                level = files.levels[name][plane_name]
                found = _with_dictionary(frames[half:], dictionary, level=level)
                plain, trained = plain + found[0], trained + found[1]
                learned += len(dictionary.as_bytes()) if dictionary else 0
            positions = _positions_of(files.planes[name], group)
            sizes = {"bytes": plain / positions, "bytes_with_dictionary": trained / positions}
            sizes["dictionaries"] = learned
            yield f"{name}.dictionary.{group}_samples", sizes


def _positions_of(planes: dict[str, Plane], group: int) -> int:
    """Positions in the second half of the groups, by a plane with one byte a position."""
    plane = planes[next(n for n in ("counts", "repeats", "entries") if n in planes)]
    frames = group_frames(plane, group)
    return sum(map(len, frames[len(frames) // 2 :]))


def _with_dictionary(
    frames: list[bytes], dictionary: zstandard.ZstdCompressionDict | None, *, level: int
) -> tuple[int, int]:
    plain = [zstd_bytes(frame, level=level) for frame in frames]
    if dictionary is None:
        return sum(plain), sum(plain)
    compressor = zstandard.ZstdCompressor(level=level, dict_data=dictionary)
    return sum(plain), sum(
        min(size, len(compressor.compress(frame)))
        for size, frame in zip(plain, frames, strict=True)
    )


def pcodec(files: Files) -> Iterator[Row]:
    """Streams of integers through pcodec, against shorts through zstd as they are stored."""
    try:
        from pcodec import ChunkConfig, standalone
    except ImportError as error:
        raise MissingDependencyError(
            "the comparison with pcodec needs it", todo="pip install pcodec"
        ) from error

    streams = {
        "pps06": ("top", "head", "tail", "value"),
        "counts50": ("repeat", "single", "count"),
        "topk50": ("id",),
    }
    for name, stored in streams.items():
        planes = files.planes[name]
        for plane in stored:
            values = decode_shorts(planes, plane)
            small = values.astype(np.uint16) if values.max() < 1 << 16 else values
            parts = (plane, f"{plane}/extra")
            size = sum(
                zstd_bytes(planes[part].data.tobytes(), level=files.levels[name][part])
                for part in parts
            )
            packed = len(standalone.simple_compress(small, ChunkConfig()))
            found = {"bytes": size / files.S, "bytes_pcodec": packed / files.S}
            yield f"{name}.pcodec.{plane}", found
