"""Bytes and flags of every token id of a parsed tokenizer.json."""

from __future__ import annotations

from enum import IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.align.spelling import Spelling


class TokenFlag(IntFlag):
    """What a token id is, beside its bytes; persisted, so a value is never reused."""

    SPECIAL = 1  # added and marked special (BOS, <|im_end|>): literal UTF-8, not text of a user
    ADDED = 2  # added and not special (<think>, a run of spaces): text, found before the model
    BYTE = 4  # a byte fallback <0xNN>: one raw byte, usually part of a character
    UNUSED = 8  # no token has this id: bytes are null
    UNKNOWN = 16  # stands for text that the vocabulary cannot spell: bytes are not that text


def bytes_and_flags(
    state: dict[str, Any], spelling: Spelling
) -> tuple[list[bytes | None], NDArray[np.uint8]]:
    """``bytes_V`` and ``flags_V`` uint8 of a tokenizer, V being its highest id plus one."""
    pieces = _model_pieces(state["model"])
    added = {token["id"]: token for token in state["added_tokens"]}
    size = 1 + max([*pieces, *added], default=-1)
    bytes_V: list[bytes | None] = [None] * size
    flags_V = np.full(size, TokenFlag.UNUSED, np.uint8)
    _fill_pieces(bytes_V, flags_V, pieces, spelling)
    _fill_added(bytes_V, flags_V, added, pieces, spelling)
    if not _spells_every_byte(bytes_V):
        _flag_unknown(flags_V, state["model"])
    return bytes_V, flags_V


def _model_pieces(model: dict[str, Any]) -> dict[int, str]:
    """Id -> piece of the model's vocabulary (Unigram lists pairs of piece and score)."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return {token: piece for piece, token in vocab.items()}
    return {token: piece for token, (piece, _) in enumerate(vocab)}


def _fill_pieces(
    bytes_V: list[bytes | None],
    flags_V: NDArray[np.uint8],
    pieces: dict[int, str],
    spelling: Spelling,
) -> None:
    for token, piece in pieces.items():
        bytes_V[token] = spelling.to_bytes(piece)
    flags_V[list(pieces)] = 0
    byte_ids = [token for token, piece in pieces.items() if spelling.is_byte(piece)]
    flags_V[byte_ids] = TokenFlag.BYTE


def _fill_added(
    bytes_V: list[bytes | None],
    flags_V: NDArray[np.uint8],
    added: dict[int, dict[str, Any]],
    pieces: dict[int, str],
    spelling: Spelling,
) -> None:
    """Added tokens are literal UTF-8, but for SentencePiece's user-defined pieces.

    Gemma lists its runs of ``▁`` as added tokens; they are in its vocabulary too and the model
    makes them of spaces, so they keep the bytes that the vocabulary gave them.
    """
    for token, entry in added.items():
        text = entry["content"]
        is_piece = spelling.marks_spaces and pieces.get(token) == text
        if entry["special"] or not is_piece:
            bytes_V[token] = text.encode()
            flags_V[token] = 0
        flags_V[token] |= TokenFlag.SPECIAL if entry["special"] else TokenFlag.ADDED


def _spells_every_byte(bytes_V: list[bytes | None]) -> bool:
    """Whether any text can be spelled: 256 byte-level characters or byte fallbacks."""
    return len({token for token in bytes_V if token is not None and len(token) == 1}) == 256


def _flag_unknown(flags_V: NDArray[np.uint8], model: dict[str, Any]) -> None:
    unknown = model.get("unk_id")
    if unknown is None and (piece := model.get("unk_token")) is not None:
        unknown = model["vocab"].get(piece)
    if unknown is not None:
        flags_V[unknown] |= TokenFlag.UNKNOWN
