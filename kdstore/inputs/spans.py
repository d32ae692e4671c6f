"""From character ranges to token ranges, and from painted tokens to spans."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdstore.sample import Span


class TokenMap:
    """Which tokens a range of characters holds, from a fast tokenizer's offsets.

    A token belongs to the range that its first character is in. A space does not count as first
    where more follows: most vocabularies write a word's space into the word's token, and an answer
    "42" after "Answer: " is the token " 42". A token that holds any other character from
    before a range ("\\n\\n" of a header's and an answer's line break) is not in the range: nobody
    who is given the text before it can generate that token.
    """

    def __init__(self, text: str, offsets: Sequence[tuple[int, int]]) -> None:
        self._text = text
        table = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        # A letter of several byte tokens repeats its offsets; some tokenizers step back by one.
        self._starts_T = np.maximum.accumulate(table[:, 0])
        self._ends_T = np.maximum.accumulate(table[:, 1])

    def tokens(self, start: int, end: int) -> tuple[int, int]:
        """Half-open token range of the characters ``[start, end)``."""
        first = self._first_from(start)
        return first, max(first, self._first_from(end))

    def _first_from(self, char: int) -> int:
        token = int(np.searchsorted(self._starts_T, char, side="left"))
        if token and self._ends_T[token - 1] > char:
            start, end = int(self._starts_T[token - 1]), int(self._ends_T[token - 1])
            before, after = self._text[start:char], self._text[char:end]
            if not before.strip(" ") and after.strip(" "):
                return token - 1
        return token


class SpanPainter:
    """Kinds and supervision of T tokens: later strokes cover earlier ones on template."""

    def __init__(self, num_tokens: int) -> None:
        self._kinds = ["template"]
        self._kind_T: NDArray[np.int32] = np.zeros(num_tokens, dtype=np.int32)
        self._supervised_T: NDArray[np.bool_] = np.zeros(num_tokens, dtype=np.bool_)

    def paint(self, start: int, end: int, kind: str, *, supervised: bool | None = None) -> None:
        """Gives tokens ``[start, end)`` a kind and, unless None, their supervision."""
        if kind not in self._kinds:
            self._kinds.append(kind)
        self._kind_T[start:end] = self._kinds.index(kind)
        if supervised is not None:
            self._supervised_T[start:end] = supervised

    def ignore(self, ignored_T: NDArray[np.bool_]) -> None:
        """Takes supervision from the tokens of a mask."""
        self._supervised_T &= ~ignored_T

    def spans(self) -> tuple[Span, ...]:
        """The fewest spans that cover all tokens, ascending."""
        key_T = self._kind_T * 2 + self._supervised_T
        if not len(key_T):
            return ()
        cuts = [0, *(np.flatnonzero(np.diff(key_T)) + 1).tolist(), len(key_T)]
        return tuple(
            Span(start, end, self._kinds[self._kind_T[start]], bool(self._supervised_T[start]))
            for start, end in itertools.pairwise(cuts)
        )


def cut_spans(spans: tuple[Span, ...], start: int, end: int, *, shift: int = 0) -> tuple[Span, ...]:
    """The parts of spans inside ``[start, end)``, counted from ``start`` and moved by ``shift``."""
    parts = ((max(span.start, start), min(span.end, end), span) for span in spans)
    return tuple(
        Span(low - start + shift, high - start + shift, span.kind, span.supervised)
        for low, high, span in parts
        if low < high
    )
