"""How each kind of tokenizer spells bytes in the pieces of its vocabulary.

| kind            | spelling                                                  | of        |
|-----------------|-----------------------------------------------------------|-----------|
| `byte_level`    | one character per byte, GPT-2's alphabet                  | Qwen, Llama 3 |
| `byte_fallback` | `▁` is a space, `<0xNN>` one byte, all else its UTF-8     | Llama 2, Gemma |
| `metaspace`     | the same without byte pieces: unknown characters are lost | older BPE |
| `unigram`       | `▁` is a space; `<0xNN>` one byte if the model says so    | T5, XLM-R |
| `wordpiece`     | a leading `##` glues, otherwise a space comes first       | BERT      |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from kdstore.align.backend import components
from kdstore.errors import TeacherError

_SPACE_MARK = "▁"
# Marks of word boundaries (CLIP's "</w>") that are no text: their spaces are not in the pieces.
_BPE_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Spelling:
    """How one tokenizer writes bytes.

    * ``kind``: a name from the module's table
    * ``to_bytes``: piece of the model's vocabulary -> the bytes it stands for
    * ``byte_pieces``: whether ``<0xNN>`` is one raw byte
    * ``prefix_space``: whether encoding puts a space before a text that starts without one
    """

    kind: str
    to_bytes: Callable[[str], bytes]
    byte_pieces: bool
    prefix_space: bool

    @property
    def marks_spaces(self) -> bool:
        """Whether pieces write a space as ``▁``, also in the added tokens that are pieces."""
        return self.kind in ("byte_fallback", "metaspace", "unigram")

    def is_byte(self, piece: str) -> bool:
        """Whether a piece is one raw byte of the byte fallback."""
        return self.byte_pieces and _BYTE_PIECE.fullmatch(piece) is not None


def spelling_of(state: dict[str, Any]) -> Spelling:
    """The spelling of a parsed tokenizer.json.

    ``TeacherError`` if it is of no kind in the module's table.
    """
    kind = _kind_of(state)
    byte_pieces = kind in ("byte_fallback", "unigram") and _has_byte_fallback(state)
    return Spelling(kind, _speller(kind, state, byte_pieces), byte_pieces, _adds_space(kind, state))


def _steps(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in ("decoder", "pre_tokenizer", "normalizer"):
        yield from components(state.get(part))


def _kind_of(state: dict[str, Any]) -> str:
    model = state["model"]["type"]
    if model == "BPE" and any(state["model"].get(affix) for affix in _BPE_AFFIXES):
        raise _unknown_kind(state)
    if any(step["type"] == "ByteLevel" for step in _steps(state)):
        return "byte_level"
    if model == "WordPiece":
        return "wordpiece"
    if _space_mark(state) is None or model not in ("BPE", "Unigram"):
        raise _unknown_kind(state)
    if model == "Unigram":
        return "unigram"
    return "byte_fallback" if _has_byte_fallback(state) else "metaspace"


def _unknown_kind(state: dict[str, Any]) -> TeacherError:
    steps = [step["type"] for step in components(state.get("decoder"))]
    return TeacherError(
        "unknown tokenizer kind: how its tokens spell bytes is not known",
        expected="byte-level BPE, SentencePiece-style BPE or Unigram, or WordPiece",
        got=f"model {state['model']['type']}, decoder {' + '.join(steps) or 'none'}",
        todo="use a teacher with one of these tokenizers, or add the kind in "
        "kdstore/align/spelling.py",
    )


def _has_byte_fallback(state: dict[str, Any]) -> bool:
    return bool(state["model"].get("byte_fallback", False))


def _space_mark(state: dict[str, Any]) -> str | None:
    """The character that stands for a space, None if no step says so."""
    for step in _steps(state):
        if step["type"] == "Metaspace":
            return str(step.get("replacement", _SPACE_MARK))
        if step["type"] == "Replace" and _SPACE_MARK in (_pattern(step), step["content"]):
            return _SPACE_MARK
    return None


def _pattern(step: dict[str, Any]) -> str | None:
    pattern: dict[str, str] = step["pattern"]
    return pattern.get("String")


def _adds_space(kind: str, state: dict[str, Any]) -> bool:
    """Whether encoding prepends a space (WordPiece text has none to tell, so always)."""
    if kind == "wordpiece":
        return True
    encoders = [*components(state.get("pre_tokenizer")), *components(state.get("normalizer"))]
    return any(_step_adds_space(step) for step in encoders)


def _step_adds_space(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step.get("add_prefix_space", False))
    if step["type"] == "Metaspace":
        # Files from before prepend_scheme have add_prefix_space, on by default.
        default = "always" if step.get("add_prefix_space", True) else "never"
        return bool(step.get("prepend_scheme", default) != "never")
    return bool(step["type"] == "Prepend")


def _speller(kind: str, state: dict[str, Any], byte_pieces: bool) -> Callable[[str], bytes]:
    if kind == "byte_level":
        return partial(_spell_byte_level, _byte_of_character())
    if kind == "wordpiece":
        return partial(_spell_wordpiece, state["model"].get("continuing_subword_prefix", "##"))
    mark = _space_mark(state) or _SPACE_MARK
    return partial(_spell_byte_fallback if byte_pieces else _spell_metaspace, mark)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 is itself, the other 68 bytes are U+0100 and up.

    Source: ``bytes_to_unicode`` of openai/gpt-2, encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


def _spell_byte_level(alphabet: dict[str, int], piece: str) -> bytes:
    """A piece with a character outside the alphabet is literal, as in tokenizers' decoder."""
    try:
        return bytes([alphabet[character] for character in piece])
    except KeyError:
        return piece.encode()


def _spell_metaspace(mark: str, piece: str) -> bytes:
    return piece.replace(mark, " ").encode()


def _spell_byte_fallback(mark: str, piece: str) -> bytes:
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else _spell_metaspace(mark, piece)


def _spell_wordpiece(glue: str, piece: str) -> bytes:
    tail = piece.removeprefix(glue)
    return tail.encode() if glue and tail != piece else b" " + piece.encode()
