"""Overlays: another draw, or more scalars, that were added to a finished store.

An overlay is laid out and committed as a store is, in a folder of its own: a header, shards,
commits, manifests. It names its store by digest and changes nothing in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdstore.commits import CommitsByUnit, load_commits
from kdstore.errors import HeaderError
from kdstore.filesystem import Folder
from kdstore.header import MAX_HEADER_BYTES, Header, check_names, check_plan
from kdstore.layout import OVERLAY_HEADER, OVERLAYS, is_overlay_name, overlay_path

_FIELDS = {
    "store": str,
    "signal": str,
    "codec": str,
    "draw": int,
    "scalars": list,
    "columns": list,
}


@dataclass(frozen=True)
class OverlayHeader(Header):
    """``overlay.json``. Its identity says which store it extends, and by what.

    Either ``draw`` is above 0, and the overlay holds the entries of that draw; or ``scalars`` are
    named, and it holds those.
    """

    @property
    def draw(self) -> int:
        """The draw whose entries the overlay holds; 0 if it holds scalars."""
        return int(self.identity["draw"])

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the scalars that the overlay holds."""
        return tuple(self.identity["scalars"])

    def check_fields(self, where: str) -> None:
        """HeaderError unless plan and identity have what a reader needs."""
        for name, kind in _FIELDS.items():
            value = self.identity.get(name)
            if type(value) is not kind:
                raise HeaderError(
                    f"identity.{name} is missing", where=where, expected=kind.__name__, got=value
                )
        check_plan(self, where)
        check_names(self.identity["scalars"], what="identity.scalars", where=where)
        if self.draw < 0 or (self.draw > 0) == bool(self.scalars):
            raise HeaderError(
                "an overlay holds a draw or scalars",
                where=where,
                expected="one of the two",
                got=f"draw {self.draw} and scalars {self.scalars}",
            )


@dataclass(frozen=True)
class Overlay:
    """An overlay as it was found: its name, folder and header, and its commits by unit."""

    name: str
    folder: Folder
    header: OverlayHeader
    commits: CommitsByUnit

    @property
    def progress(self) -> str:
        """Units that are committed of those that there are: ``3 of 7 units``."""
        return f"{len(self.commits)} of {self.header.num_units} units"

    def describe(self) -> dict[str, Any]:
        """What it holds and how far it has come, for people."""
        return {"units": self.progress, **self.header.identity}


def overlay_names(folder: Folder) -> list[str]:
    """Names of the overlays that a store may have: what lies in their folder, by name."""
    return [name for name in folder.names(OVERLAYS) if is_overlay_name(name)]


def read_overlay(folder: Folder, name: str, header: Header) -> Overlay | None:
    """The overlay of a name in the store of ``header``; None if there is none.

    Raises HeaderError if its header or a commit is damaged, or of another store.
    """
    inner = folder.within(overlay_path(name))
    where = inner.location(OVERLAY_HEADER)
    try:
        data = inner.read(OVERLAY_HEADER, max_bytes=MAX_HEADER_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    found = OverlayHeader.from_bytes(data, where=where)
    expected = (header.config_digest, header.num_units)
    if (found.identity["store"], found.num_units) != expected:
        raise HeaderError(
            "the overlay belongs to another store",
            where=where,
            expected=expected,
            got=(found.identity["store"], found.num_units),
            todo=f"remove the folder {overlay_path(name)}, which was copied in from elsewhere",
        )
    return Overlay(name, inner, found, CommitsByUnit(load_commits(inner, found)))


def read_overlays(folder: Folder, header: Header) -> list[Overlay]:
    """All overlays of a store, by name; HeaderError as ``read_overlay`` raises it."""
    found = (read_overlay(folder, name, header) for name in overlay_names(folder))
    return [overlay for overlay in found if overlay is not None]
