"""Digests and counter-based randomness.

A random number is a hash of what it is for, never the next of a stream: the same position gets
the same number in any batch, on any device, after any resume. It is computed on the host with
numpy's wrapping uint64 arithmetic, so no device can disagree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a uniform is for; two purposes never share one."""

    TAIL_SAMPLING = 1
    MULTINOMIAL = 2
    VALUE_ROUNDING = 3
    WEIGHT_ROUNDING = 4
    SCALAR_ROUNDING = 5
    ORDER = 6
    GROUP_ORDER = 7
    AUDIT = 8
    SHARD_ORDER = 9
    GENERATION = 10


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_fields(*fields: int | NDArray[Any]) -> NDArray[np.uint64]:
    """uint64 hash of the broadcast fields, each an integer or an integer array."""
    state: NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
    for field in fields:
        value = np.uint64(field % (1 << 64)) if isinstance(field, int) else field.astype(np.uint64)
        state = mix64((state ^ value) + _GOLDEN)
    return state


def to_uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """float64 in [0, 1) from the high 53 bits of each hash."""
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def sample_hash(sample_id: str) -> int:
    """xxh3_64 of a sample id's UTF-8 bytes: the id's part in every key."""
    return int(xxhash.xxh3_64_intdigest(sample_id.encode("utf-8")))


@dataclass(frozen=True)
class RowKeys:
    """What identifies the random numbers of S positions.

    ``sample_hash_S`` uint64 and ``position_S`` int64 have one value per scored position.
    """

    seed: int
    sample_hash_S: NDArray[np.uint64]
    position_S: NDArray[np.int64]
    draw: int = 0

    @classmethod
    def of_samples(
        cls, samples: Sequence[tuple[str, NDArray[np.int64]]], *, seed: int, draw: int = 0
    ) -> RowKeys:
        """Keys of several samples' scored positions, one after the other."""
        lengths = [len(positions) for _, positions in samples]
        hashes = np.array([sample_hash(sample_id) for sample_id, _ in samples], dtype=np.uint64)
        positions = [positions for _, positions in samples] or [np.zeros(0, np.int64)]
        return cls(seed, np.repeat(hashes, lengths), np.concatenate(positions), draw)

    def __len__(self) -> int:
        return len(self.position_S)

    def __getitem__(self, rows: slice | NDArray[Any]) -> RowKeys:
        return RowKeys(self.seed, self.sample_hash_S[rows], self.position_S[rows], self.draw)

    def uniform(self, purpose: Purpose, *, count: int = 1) -> NDArray[np.float64]:
        """float64 [S, count] in [0, 1), one number per position and index."""
        base = self._base(purpose)
        return to_uniform(hash_fields(base[:, None], np.arange(count)[None, :]))

    def uniform_at(
        self, purpose: Purpose, rows_N: NDArray[np.int64], index_N: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """float64 [N]: the number of each (position row, index) pair."""
        return to_uniform(hash_fields(self._base(purpose)[rows_N], index_N))

    def _base(self, purpose: Purpose) -> NDArray[np.uint64]:
        return hash_fields(
            self.seed, self.sample_hash_S, self.position_S, self.draw, int(purpose)
        ).reshape(len(self))


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8")


def sha256_hex(data: bytes) -> str:
    """SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 over the canonical JSON of a value, in hex."""
    return sha256_hex(canonical_json(value))
