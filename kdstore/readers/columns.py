"""Which parts of samples are read: all, or those that a training loop needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdstore.codecs import IdOrder, SignalCodec, codec_named
from kdstore.codecs.scalars_only import ScalarsCodec
from kdstore.errors import UsageError
from kdstore.sample import Sample
from kdstore.signal import NO_ENTRIES

ENTRIES = "entries"
_ALWAYS = ("sample_id", "num_tokens", "num_scored", "input_ids")


@dataclass(frozen=True)
class Columns:
    """Names of what is read beside ids, token ids and scored positions.

    ``entries`` is the distributions; the others are plain columns and scalars. Row hashes cover all
    columns and are not checked then; page checksums are.
    """

    names: frozenset[str]

    def expect(self, known: Iterable[str], *, where: str) -> None:
        """UsageError for a name that the store does not have."""
        expected = {ENTRIES, *known} - set(_ALWAYS)
        if not self.names <= expected:
            raise UsageError(
                "the store has no such column",
                where=where,
                expected="of " + ", ".join(sorted(expected)),
                got=", ".join(sorted(self.names - expected)),
                todo="token ids and scored positions are always read",
            )

    def plain(self, stored: Iterable[str]) -> list[str]:
        """The plain columns that are read of those that are stored."""
        return [name for name in stored if name in _ALWAYS or name in self.names]

    def codec(self, signal: Mapping[str, Any], *, order: IdOrder, where: str) -> SignalCodec:
        """The codec that decodes no more of a signal than is read."""
        scalars = self.of(signal["scalars"])
        if ENTRIES not in self.names:
            return ScalarsCodec(NO_ENTRIES, order=order, scalars=scalars)
        return codec_named(
            signal["codec"], signal["selection"], order=order, scalars=scalars, where=where
        )

    def of(self, names: Sequence[str]) -> list[str]:
        """Those of some names that are read."""
        return [name for name in names if name in self.names]

    def reduce(self, sample: Sample) -> Sample:
        """The sample without the scalars that came with others of an overlay."""
        signal = sample.signal
        if signal is None or signal.scalars.keys() <= self.names:
            return sample
        scalars = {name: values for name, values in signal.scalars.items() if name in self.names}
        return replace(sample, signal=replace(signal, scalars=scalars))
