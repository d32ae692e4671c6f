"""The id order: in which order a store counts its token ids.

First come the tokens that the source saw follow the position's previous token, most often first;
then all tokens of the vocabulary, most frequent first. So the ranks of likely tokens are small. It
is a pure function of source and tokenizer: no worker can learn another one.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdstore.arrowfile import read_ipc
from kdstore.codecs.jit import i64, kernel, u
from kdstore.errors import HeaderError
from kdstore.hashing import sha256_hex

MAX_PAIRS = 1 << 20
MIN_PAIR_COUNT = 2


@dataclass(frozen=True, eq=False)
class Successors:
    """Tokens that follow others: those after token p are ``ids_P[first_V1[p]:first_V1[p + 1]]``.

    ``first_V1`` int64 [V+1] ascends from 0 to P, ``ids_P`` int32; none twice after one token.
    """

    first_V1: NDArray[np.int64]
    ids_P: NDArray[np.int32]

    @classmethod
    def none(cls, vocab_size: int) -> Successors:
        """No token has a successor."""
        return cls(np.zeros(vocab_size + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))

    @classmethod
    def from_counts(
        cls, pairs_P: NDArray[np.int64], counts_P: NDArray[np.int64], vocab_size: int
    ) -> Successors:
        """The ``MAX_PAIRS`` most frequent pairs (previous * V + next) of those seen at least twice.

        After each token the frequent successors come first; all ties by id.
        """
        kept = np.flatnonzero(counts_P >= MIN_PAIR_COUNT)
        kept = kept[np.lexsort((pairs_P[kept], -counts_P[kept]))[:MAX_PAIRS]]
        previous, following = np.divmod(pairs_P[kept], vocab_size)
        order = np.lexsort((following, -counts_P[kept], previous))
        first = np.searchsorted(previous[order], np.arange(vocab_size + 1))
        return cls(first.astype(np.int64), following[order].astype(np.int32))

    @cached_property
    def places(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """[2P] each: a hash table of the successors of every token, half full; see ``slot_of``.

        First their ids, -1 where free, then the place of each among the successors.
        """
        keys, values = np.full((2, 2 * len(self.ids_P)), -1, dtype=np.int32)
        _fill(self.first_V1, self.ids_P, keys, values)
        return keys, values


@kernel
def slot_of(token: int, low: int, count: int, keys: NDArray[Any]) -> int:
    """Where a token is in ``keys[2 * low : 2 * (low + count)]``, or would be: there -1 is.

    By linear probing after multiplicative hashing (Knuth, vol. 3, 6.4).
    """
    size = 2 * count
    slot = ((token * 0x9E3779B1 & 0xFFFFFFFF) * size) >> 32
    while keys[u(2 * low + slot)] != token and keys[u(2 * low + slot)] >= 0:
        slot = slot + 1 if slot + 1 < size else 0
    return 2 * low + slot


@kernel
def _fill(
    first_V1: NDArray[Any], ids_P: NDArray[Any], keys: NDArray[Any], values: NDArray[Any]
) -> None:
    for previous in range(len(first_V1) - 1):
        low, count = first_V1[previous], first_V1[previous + 1] - first_V1[previous]
        for i in range(count):
            slot = slot_of(i64(ids_P[low + i]), low, count, keys)
            keys[slot], values[slot] = ids_P[low + i], i


@dataclass(frozen=True, eq=False)
class IdOrder:
    """A permutation of the vocabulary, and successors that come before it.

    ``id_of_V[rank]`` and ``rank_of_V[id]`` int32. A token that is the s-th successor of the
    previous token p has rank s there; any other has ``num successors of p + rank_of_V[id]``.
    """

    id_of_V: NDArray[np.int32]
    successors: Successors
    rank_of_V: NDArray[np.int32] = field(init=False)

    @cached_property
    def token_of(self) -> NDArray[np.int32]:
        """int32 [P + V]: ``successors.ids_P``, then ``id_of_V``, so that reading is one lookup."""
        return np.concatenate([self.successors.ids_P, self.id_of_V])

    def __post_init__(self) -> None:
        rank_of_V = np.empty(len(self.id_of_V), dtype=np.int32)
        rank_of_V[self.id_of_V] = np.arange(len(self.id_of_V), dtype=np.int32)
        object.__setattr__(self, "rank_of_V", rank_of_V)

    @classmethod
    def from_counts(
        cls, counts_V: NDArray[np.int64], successors: Successors | None = None
    ) -> IdOrder:
        """Frequent tokens first, ties by id."""
        ids = np.argsort(-counts_V, kind="stable").astype(np.int32)
        return cls(ids, successors or Successors.none(len(ids)))

    @classmethod
    def identity(cls, vocab_size: int) -> IdOrder:
        """The tokenizer's own order."""
        return cls(np.arange(vocab_size, dtype=np.int32), Successors.none(vocab_size))

    @property
    def vocab_size(self) -> int:
        """V, the width of the teacher's logits."""
        return len(self.id_of_V)

    def digest(self) -> str:
        """SHA-256 over little-endian int32: permutation, successors per token, successors."""
        lengths = np.diff(self.successors.first_V1)
        parts = (self.id_of_V, lengths, self.successors.ids_P)
        return sha256_hex(b"".join(part.astype("<i4").tobytes() for part in parts))

    def to_bytes(self) -> bytes:
        """An Arrow IPC file of V rows: ``id`` by rank, ``successors`` by previous token."""
        sink = io.BytesIO()
        first = pa.array(self.successors.first_V1, pa.int32())
        following = pa.ListArray.from_arrays(first, pa.array(self.successors.ids_P, pa.int32()))
        table = pa.table({"id": pa.array(self.id_of_V, pa.int32()), "successors": following})
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, *, expected_digest: str, where: str) -> IdOrder:
        """The order in an Arrow IPC file; HeaderError unless it is the one the header names."""
        try:
            table = read_ipc(data).combine_chunks()
            ids = table["id"].cast(pa.int32()).to_numpy()
            lists = table["successors"].combine_chunks().cast(pa.list_(pa.int32()))
            first = lists.offsets.to_numpy().astype(np.int64)
            following = lists.flatten().to_numpy()
            _check_ids(ids, following)
            order = cls(ids, Successors(first - first[0], following))
        except (pa.ArrowException, OSError, LookupError, ValueError) as error:
            raise HeaderError("cannot read the id order", where=where, got=error) from error
        digest = order.digest()
        if digest != expected_digest:
            raise HeaderError(
                "the id order is not the one that the header names",
                where=where,
                expected=expected_digest,
                got=digest,
                todo="restore idorder.arrow; without it no token id of the store can be read",
            )
        return order


def _check_ids(id_of_V: NDArray[np.int32], successors_P: NDArray[np.int32]) -> None:
    """ValueError unless the ids are a permutation and all successors are among them."""
    V = len(id_of_V)
    if not np.array_equal(np.sort(id_of_V), np.arange(V)):
        raise ValueError("the ids are no permutation of the vocabulary")
    if len(successors_P) and not 0 <= int(successors_P.min()) <= int(successors_P.max()) < V:
        raise ValueError("a successor lies outside the vocabulary")
