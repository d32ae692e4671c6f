"""What a loader's batches are: its options, checked, and one batch as a plan to read it by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import UsageError

if TYPE_CHECKING:
    from kdstore.readers.samples import Index

Overlong = Literal["error", "skip", "truncate", "split"]
MAX_STREAMS = 64  # a state has a place for each, and is to stay small


@dataclass(frozen=True)
class BatchConfig:
    """Which batches there are, in which order: all that a state must agree with.

    * ``batch_tokens``: tokens of a batch at most, padding included; or ``batch_size``: samples, or
      packs if ``pack``
    * ``pack``: several samples share a row of ``max_length`` tokens (by default one row of
      ``batch_tokens``), whole, by best fit within a window
    * ``max_length``: tokens of a row at most; ``overlong`` says what becomes of longer samples:
      ``error``, ``skip``, ``truncate`` to the first tokens, or ``split`` into several samples
    * ``min_tokens``, ``max_tokens``: samples of other lengths are left out
    * ``seed``, ``shuffle``: of the order; ``draw``: of the signal, by default epoch e reads draw
      e mod ``num_draws``
    * ``streams``: shares of the shards that are read in turn, of ``shards_at_once`` shards each,
      shuffled by ``window`` row groups. More mix better and take more memory
    """

    batch_tokens: int | None = None
    batch_size: int | None = None
    pack: bool = False
    max_length: int | None = None
    overlong: Overlong = "error"
    min_tokens: int = 0
    max_tokens: int | None = None
    seed: int = 0
    shuffle: bool = True
    draw: int | None = None
    streams: int = 64
    shards_at_once: int = 4
    window: int = 4

    def __post_init__(self) -> None:
        if (self.batch_tokens is None) == (self.batch_size is None):
            raise UsageError(
                "a loader needs one of batch_tokens and batch_size",
                got=f"batch_tokens={self.batch_tokens}, batch_size={self.batch_size}",
            )
        if self.pack and self.batch_size is not None and self.max_length is None:
            raise UsageError("batch_size counts packs, which have no length", todo="set max_length")
        _check(self, "batch_tokens", 1)
        _check(self, "batch_size", 1)
        _check(self, "max_length", 2, self.batch_tokens)
        _check(self, "streams", 1, MAX_STREAMS)
        _check(self, "shards_at_once", 1)
        _check(self, "window", 1)
        if self.overlong not in ("error", "skip", "truncate", "split"):
            expected = "error, skip, truncate or split"
            raise UsageError("unknown overlong", expected=expected, got=self.overlong)

    @property
    def pack_tokens(self) -> int:
        """Tokens of a pack at most."""
        return self.max_length or self.batch_tokens or 1

    def tokens_of_batch(self, tokens_of_sample: float) -> float:
        """About how many tokens a batch has, where samples have so many."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        return (self.batch_size or 1) * (self.pack_tokens if self.pack else tokens_of_sample)

    def is_over(self, packs: int, longest: int) -> bool:
        """Whether so many packs, with first samples of at most this length, are too many."""
        if self.batch_size is not None:
            return packs > self.batch_size
        return packs * (self.pack_tokens if self.pack else longest) > (self.batch_tokens or 0)


def _check(config: BatchConfig, name: str, least: int, most: int | None = None) -> None:
    value = getattr(config, name)
    if value is not None and not least <= value <= (most or value):
        raise UsageError(
            f"{name} cannot work",
            expected=f"{least} to {most}" if most else f"at least {least}",
            got=value,
        )


@dataclass(frozen=True, eq=False)
class BatchPlan(Sequence["Index"]):
    """Which tokens of which samples make a batch; as a sequence, (number, draw) of each sample.

    * ``pieces`` int64 [n, 3]: number of a sample, its first token, and that behind its last
    * ``packs`` int64 [P]: how many samples each pack has; without packing, one each
    * ``cursor``: the loader's state after this batch
    * ``ahead``: samples of a later batch, that may be fetched in the background
    * ``is_filler``: the batch teaches nothing; it keeps a rank in step that has no batch left
    """

    pieces: NDArray[np.int64]
    packs: NDArray[np.int64]
    draw: int
    cursor: dict[str, Any] = field(repr=False)
    is_filler: bool = False
    ahead: Sequence[Index] = ()

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [(index, self.draw) for index in self.pieces[place, 0].tolist()]
        return int(self.pieces[place, 0]), self.draw
