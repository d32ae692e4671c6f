"""The id order: in which order a store counts its token ids.

Tokens that the source uses often come first, so that the gaps between the ids of a position are
small. It is a pure function of source and tokenizer: no worker can learn another one.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdstore.errors import HeaderError
from kdstore.hashing import sha256_hex


@dataclass(frozen=True, eq=False)
class IdOrder:
    """A permutation of the vocabulary: ``id_of_V[rank]`` int32 and ``rank_of_V[id]`` int32."""

    id_of_V: NDArray[np.int32]
    rank_of_V: NDArray[np.int32]

    @classmethod
    def from_counts(cls, counts_V: NDArray[np.int64]) -> IdOrder:
        """Frequent tokens first, ties by id."""
        return cls._of_permutation(np.argsort(-counts_V, kind="stable"))

    @classmethod
    def identity(cls, vocab_size: int) -> IdOrder:
        """The tokenizer's own order."""
        return cls._of_permutation(np.arange(vocab_size))

    @classmethod
    def _of_permutation(cls, id_of_V: NDArray[np.int64]) -> IdOrder:
        rank_of_V = np.empty(len(id_of_V), dtype=np.int32)
        rank_of_V[id_of_V] = np.arange(len(id_of_V), dtype=np.int32)
        return cls(id_of_V.astype(np.int32), rank_of_V)

    @property
    def vocab_size(self) -> int:
        """V, the width of the teacher's logits."""
        return len(self.id_of_V)

    def digest(self) -> str:
        """SHA-256 over the little-endian int32 permutation."""
        return sha256_hex(self.id_of_V.astype("<i4").tobytes())

    def to_bytes(self) -> bytes:
        """An Arrow IPC file with one column ``id``, in order of rank."""
        sink = io.BytesIO()
        table = pa.table({"id": pa.array(self.id_of_V, pa.int32())})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, *, expected_digest: str, where: str) -> IdOrder:
        """The order in an Arrow IPC file; HeaderError unless it is the one the header names."""
        try:
            column = pa.ipc.open_file(pa.BufferReader(data)).read_all()["id"]
            ids = column.cast(pa.int32()).to_numpy()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise HeaderError("cannot read the id order", where=where, got=error) from error
        digest = sha256_hex(ids.astype("<i4").tobytes())
        if digest != expected_digest:
            raise HeaderError(
                "the id order is not the one that the header names",
                where=where,
                expected=expected_digest,
                got=digest,
                todo="restore idorder.arrow; without it no token id of the store can be read",
            )
        return cls._of_permutation(ids.astype(np.int64))
