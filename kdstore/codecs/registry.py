"""Which codec writes a selection, and which codec a name in a header stands for."""

from __future__ import annotations

from collections.abc import Sequence

from kdstore.codecs.base import SignalCodec
from kdstore.codecs.counts import CountsCodec
from kdstore.codecs.full import FullCodec
from kdstore.codecs.order import IdOrder
from kdstore.codecs.pps import PPSCodec
from kdstore.codecs.ranked import RankedCodec
from kdstore.errors import HeaderError

CODECS: dict[str, type[SignalCodec]] = {
    codec.name: codec for codec in (RankedCodec, PPSCodec, CountsCodec, FullCodec)
}
_BY_KIND: dict[str, type[SignalCodec]] = {
    "topk": RankedCodec,
    "topp": RankedCodec,
    "pps": PPSCodec,
    "counts": CountsCodec,
    "full": FullCodec,
}


def codec_name_for(selection: str) -> str:
    """Name of the codec that new stores use for a selection's text."""
    return _BY_KIND[selection.partition(":")[0]].name


def codec_for(selection: str, *, order: IdOrder, scalars: Sequence[str]) -> SignalCodec:
    """The codec that new stores use for a selection's text, such as ``pps:tau=0.06``."""
    return _BY_KIND[selection.partition(":")[0]](selection, order=order, scalars=scalars)


def codec_named(
    name: str, selection: str, *, order: IdOrder, scalars: Sequence[str], where: str
) -> SignalCodec:
    """The codec that a header names; HeaderError if this version does not know it."""
    if name not in CODECS:
        raise HeaderError(
            f"unknown codec {name!r}",
            where=where,
            expected="one of " + ", ".join(sorted(CODECS)),
            got=name,
            todo="read this store with a newer kdstore",
        )
    return CODECS[name](selection, order=order, scalars=scalars)
