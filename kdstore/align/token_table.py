"""TokenTable: token id -> bytes and flags, so that a store outlives its teacher's tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from kdstore.align.backend import backend_state
from kdstore.align.spelling import spelling_of
from kdstore.align.table_file import (
    build_arrow,
    check_arrow,
    check_fingerprint,
    dump_arrow,
    load_arrow,
)
from kdstore.align.vocabulary import TokenFlag, bytes_and_flags
from kdstore.errors import SignalError

_FINGERPRINT_DOMAIN = b"kdstore.token_table.1\0"


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Bytes and flags of the V token ids of a tokenizer, id V-1 being its highest.

    * ``kind``: how the tokenizer spells bytes, see ``kdstore.align.spelling``
    * ``bytes_V``: bytes of each id; a token need not be whole UTF-8; None where no token has the id
    * ``flags_V`` uint8: bits of ``TokenFlag``
    * ``prefix_space``: the tokenizer puts a space before a text that starts without one, so
      ``decode`` may give one leading space more than the text had (SentencePiece strips it)

    The bytes are those of the *normalised* text: what NFC, lower-casing or the collapse of spaces
    changed before tokenisation is not undone, and SentencePiece reads a literal ``▁`` as a space.
    """

    kind: str
    bytes_V: tuple[bytes | None, ...]
    flags_V: NDArray[np.uint8]
    prefix_space: bool = False

    def __post_init__(self) -> None:
        _check_shapes(self)
        self.flags_V.flags.writeable = False

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenTable:
        """The table of a Hugging Face fast tokenizer (``PreTrainedTokenizerFast``).

        ``TeacherError`` if it has no fast backend or spells bytes in no known way.
        """
        return cls.from_backend_state(backend_state(tokenizer))

    @classmethod
    def from_backend_state(cls, state: dict[str, Any]) -> TokenTable:
        """The table of a parsed tokenizer.json; ``TeacherError`` if its kind is unknown."""
        spelling = spelling_of(state)
        bytes_V, flags_V = bytes_and_flags(state, spelling)
        return cls(spelling.kind, tuple(bytes_V), flags_V, spelling.prefix_space)

    def __len__(self) -> int:
        return len(self.bytes_V)

    def decode(self, ids: ArrayLike) -> bytes:
        """The bytes of token ids, one after the other; special tokens are their literal text.

        Cut anywhere, they need not be valid UTF-8. ``SignalError`` for an id without a token.

        >>> table = TokenTable("byte_level", (b"he", b"llo"), np.zeros(2, np.uint8))
        >>> table.decode([0, 1, 1])
        b'hellollo'
        """
        ids_T = np.asarray(ids, dtype=np.int64).reshape(-1)
        self._check_ids(ids_T)
        return b"".join(self.bytes_V[token] or b"" for token in ids_T.tolist())

    def has_flag(self, flag: TokenFlag) -> NDArray[np.bool_]:
        """bool [V]: which ids carry any of the bits of a flag."""
        return np.asarray((self.flags_V & np.uint8(flag)) != 0)

    def fingerprint(self) -> str:
        """The ``vocab_digest``: SHA-256 hex over every id's bytes and flags, and nothing else.

        Merges, normaliser and kind do not count: two tokenizers with the same fingerprint mean
        the same by an id. The stream is ``kdstore.token_table.1\\0``, V as int64, the lengths of
        all tokens as int32 (-1 where there is none), the flags as uint8, the bytes; little-endian.
        """
        lengths = [-1 if token is None else len(token) for token in self.bytes_V]
        digest = hashlib.sha256(_FINGERPRINT_DOMAIN)
        digest.update(np.array(len(self), "<i8").tobytes())
        digest.update(np.array(lengths, "<i4").tobytes())
        digest.update(self.flags_V.tobytes())
        digest.update(b"".join(token or b"" for token in self.bytes_V))
        return digest.hexdigest()

    def to_arrow(self) -> pa.Table:
        """Arrow table [V]: ``id`` int32, ``bytes`` binary, ``flags`` uint8."""
        header = {
            "kind": self.kind,
            "prefix_space": self.prefix_space,
            "fingerprint": self.fingerprint(),
        }
        return build_arrow(self.bytes_V, self.flags_V, header)

    @classmethod
    def from_arrow(cls, table: pa.Table, *, where: Any = None) -> TokenTable:
        """The table that ``to_arrow`` gave; ``HeaderError`` if damaged or of a future version."""
        header = check_arrow(table, where=where)
        bytes_V = tuple(table["bytes"].to_pylist())
        flags_V = np.array(table["flags"].to_numpy(), np.uint8)
        token_table = cls(header["kind"], bytes_V, flags_V, header["prefix_space"])
        check_fingerprint(token_table.fingerprint(), header, where=where)
        return token_table

    def to_bytes(self) -> bytes:
        """The file ``table.arrow``; the same table gives the same bytes."""
        return dump_arrow(self.to_arrow())

    @classmethod
    def from_bytes(cls, data: bytes, *, where: Any = None) -> TokenTable:
        """The table of a file's bytes; ``HeaderError`` if damaged or of a future version."""
        return cls.from_arrow(load_arrow(data, where=where), where=where)

    def write(self, target: str | PathLike[str] | BinaryIO) -> None:
        """Write ``table.arrow`` to a local path or an open binary file."""
        if isinstance(target, (str, PathLike)):
            Path(target).write_bytes(self.to_bytes())
        else:
            target.write(self.to_bytes())

    @classmethod
    def read(cls, source: str | PathLike[str] | BinaryIO) -> TokenTable:
        """Read ``table.arrow`` from a local path or an open binary file; errors: ``from_bytes``."""
        if isinstance(source, (str, PathLike)):
            return cls.from_bytes(Path(source).read_bytes(), where=source)
        return cls.from_bytes(source.read(), where=getattr(source, "name", None))

    def _check_ids(self, ids_T: NDArray[np.int64]) -> None:
        known = (ids_T >= 0) & (ids_T < len(self))
        known[known] = ~self.has_flag(TokenFlag.UNUSED)[ids_T[known]]
        if known.all():
            return
        position = int(np.argmin(known))
        raise SignalError(
            "a token id that the tokenizer does not have",
            where=f"position {position}",
            expected=f"an id below {len(self)} that is in use",
            got=int(ids_T[position]),
            todo="check that the ids and the token table come from the same tokenizer",
        )


def _check_shapes(table: TokenTable) -> None:
    unused_V = np.array([token is None for token in table.bytes_V], dtype=bool)
    flags_V = table.flags_V
    if flags_V.dtype != np.uint8 or flags_V.shape != unused_V.shape:
        raise SignalError(
            "a token table needs one flag per id",
            expected=f"uint8 [{len(unused_V)}]",
            got=f"{flags_V.dtype} {list(flags_V.shape)}",
        )
    if not np.array_equal((flags_V & TokenFlag.UNUSED) != 0, unused_V):
        raise SignalError("a token table's bytes must be null exactly where the flag is UNUSED")
