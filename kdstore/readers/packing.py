"""Windows of samples to batches: rows of a padded batch, or packs of whole samples.

A batch is a list of packs; without packing, a pack is one sample. Formed from lengths alone, before
anything is dealt to ranks, so that a batch is the same whoever reads it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kdstore.errors import UsageError
from kdstore.readers.batches import BatchConfig
from kdstore.readers.order import Window

FULL = 0.97  # a pack that is filled less waits for the next window


class Piece(NamedTuple):
    """Tokens ``start:end`` of a sample, by its number: all of them unless it was cut."""

    number: int
    start: int
    end: int

    @property
    def length(self) -> int:
        """Tokens."""
        return self.end - self.start


Pack = list[Piece]
Packs = list[Pack]


@dataclass(frozen=True)
class Former:
    """Forms batches of samples."""

    config: BatchConfig

    def batches(self, windows: Iterable[Window]) -> Iterator[Packs]:
        """The batches of consecutive windows; only the last may be less than full."""
        pieces = map(self._pieces, windows)
        packs = self._packed(pieces) if self.config.pack else ([p] for some in pieces for p in some)
        batch: Packs = []
        longest = 0
        for pack in packs:
            longest = max(longest, pack[0].length)
            if batch and self.config.is_over(len(batch) + 1, longest):
                yield batch
                batch, longest = [], pack[0].length
            batch.append(pack)
        if batch:
            yield batch

    def _pieces(self, window: Window) -> list[Piece]:
        window = self._filtered(window)
        pairs = zip(window.indices.tolist(), window.lengths.tolist(), strict=True)
        if (
            self.config.max_length is None
            or int(window.lengths.max(initial=0)) <= self.config.max_length
        ):
            return [Piece(index, 0, length) for index, length in pairs]
        return [piece for index, length in pairs for piece in self._cut(index, length)]

    def _filtered(self, window: Window) -> Window:
        """The samples of ``min_tokens`` to ``max_tokens`` tokens."""
        kept = window.lengths >= self.config.min_tokens
        if self.config.max_tokens is not None:
            kept &= window.lengths <= self.config.max_tokens
        return window if kept.all() else window[kept]

    def _cut(self, index: int, length: int) -> list[Piece]:
        """A sample as pieces of at most ``max_length`` tokens.

        A piece begins with the last token of the one before: the first token of a piece has nothing
        to predict it from, so it is a position of one piece only.
        """
        most = self.config.max_length or length
        if length <= most:
            return [Piece(index, 0, length)]
        if self.config.overlong == "error":
            raise UsageError(
                "a sample is longer than max_length",
                where=f"sample number {index}",
                expected=f"at most {most} tokens",
                got=length,
                todo='choose overlong="skip", "truncate" or "split", or a larger max_length',
            )
        starts = range(0, length - 1, most - 1)
        pieces = [Piece(index, start, min(start + most, length)) for start in starts]
        return pieces[: {"skip": 0, "truncate": 1, "split": len(pieces)}[self.config.overlong]]

    def _packed(self, windows: Iterator[list[Piece]]) -> Iterator[Pack]:
        """Packs of each window, full ones; what fills no pack is packed with the next window."""
        left: Pack = []
        for pieces in windows:
            packs = best_fit(pieces, capacity=self.config.pack_tokens, begun=left)
            fills = [sum(piece.length for piece in pack) for pack in packs]
            least = min(range(len(packs)), key=fills.__getitem__, default=0)
            left = (
                packs.pop(least) if packs and fills[least] < FULL * self.config.pack_tokens else []
            )
            yield from packs
        if left:
            yield left


def best_fit(pieces: list[Piece], *, capacity: int, begun: Pack) -> Packs:
    """Pieces in packs of at most ``capacity`` tokens, by best fit, the longest first.

    A pack that was ``begun`` comes first, the others in the order of what was put in first. A piece
    longer than the capacity is a pack of its own. Source: D. S. Johnson, Near-optimal bin packing
    algorithms, 1973 (best fit decreasing).
    """
    packs: Packs = [list(begun)] if begun else []
    places = [-1] if begun else []
    spaces = [(capacity - sum(piece.length for piece in begun), 0)] if begun else []
    for place in sorted(range(len(pieces)), key=lambda place: (-pieces[place].length, place)):
        length = pieces[place].length
        found = bisect_left(spaces, (length, -1))
        if found < len(spaces):
            space, pack = spaces.pop(found)
        else:
            space, pack = capacity, len(packs)
            packs.append([])
            places.append(place)
        packs[pack].append(pieces[place])
        if space > length:
            insort(spaces, (space - length, pack))
    return [packs[n] for n in sorted(range(len(packs)), key=places.__getitem__)]
