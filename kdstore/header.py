"""The header of a store: its version, what a reader must know, and what the store is.

``identity`` says what the signals are (teacher, tokenizer, selection, source, seed); its digest is
the store's ``config_digest``. Versions, devices and times are provenance and live in commits, so
that an upgrade does not block a resume.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Self

from kdstore.errors import HeaderError, StoreMismatchError, StoreNotFoundError
from kdstore.filesystem import Folder
from kdstore.hashing import json_digest
from kdstore.layout import AUDIT_SIGNAL, HEADER

FORMAT_VERSION = "1.0"
_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")
_FOREIGN = re.compile(r"[\x00-\x1f\\:]")  # of a drive, a URL, another system's folders
KNOWN_FEATURES: frozenset[str] = frozenset()
MAX_HEADER_BYTES = 1 << 24
MAX_UNITS = 1 << 24
MAX_SCALARS = 1 << 10


@dataclass(frozen=True)
class Header:
    """``plan`` has ``kind`` and ``units``; features are names that a program must know.

    ``files`` are the SHA-256 digests of the files written with the header, by path.
    """

    identity: dict[str, Any]
    plan: dict[str, Any]
    files: dict[str, str]
    reader_features: tuple[str, ...] = ()
    writer_features: tuple[str, ...] = ()
    format_version: str = field(default=FORMAT_VERSION)

    @property
    def config_digest(self) -> str:
        """SHA-256 over the canonical JSON of the identity."""
        return json_digest(self.identity)

    @property
    def num_units(self) -> int:
        """Units of work in the plan."""
        return int(self.plan["units"])

    @property
    def audit_fraction(self) -> float:
        """Share of the scored positions that were to be audited; 0 without an audit signal."""
        return float(self.identity.get("signals", {}).get(AUDIT_SIGNAL, {}).get("fraction", 0.0))

    def to_bytes(self) -> bytes:
        """Deterministic JSON of the header, for people and programs."""
        content = {
            "format_version": self.format_version,
            "reader_features": list(self.reader_features),
            "writer_features": list(self.writer_features),
            "plan": self.plan,
            "files": self.files,
            "config_digest": self.config_digest,
            "identity": self.identity,
        }
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Self:
        """The header in a file's bytes.

        Raises HeaderError if it is damaged, of another format version, or names a feature that this
        version does not know.
        """
        content = parse_json_object(data, where=where)
        version = _checked_version(content.get("format_version"), where)
        header = cls(
            _object(content, "identity", where),
            _object(content, "plan", where),
            _checked_files(_object(content, "files", where), where),
            _features(content, "reader_features", where),
            _features(content, "writer_features", where),
            version,
        )
        _check_features(header, where)
        header.check_fields(where)
        digest = _checked_digest(header, where)
        if content.get("config_digest") != digest:
            raise HeaderError(
                "the header's identity does not match its digest",
                where=where,
                expected=content.get("config_digest"),
                got=digest,
                todo="restore the file from a backup; it is never edited by hand",
            )
        return header

    def check_fields(self, where: str) -> None:
        """HeaderError unless plan and identity have what a reader needs."""
        _check_fields(self, where)


def read_header(folder: Folder) -> Header:
    """The header of the store in a folder; StoreNotFoundError if there is none."""
    try:
        data = folder.read(HEADER, max_bytes=MAX_HEADER_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise StoreNotFoundError(
            "there is no store here",
            where=folder.url,
            expected=f"a folder with {HEADER}",
            got="no header",
            todo="check the path, or make the store with kdstore dump",
        ) from error
    return Header.from_bytes(data, where=folder.location(HEADER))


def parse_json_object(data: bytes, *, where: str) -> dict[str, Any]:
    """The JSON object in bytes from outside; HeaderError if it is too large, too deep or none."""
    if len(data) > MAX_HEADER_BYTES:
        raise HeaderError(
            "file is too large", where=where, expected=f"at most {MAX_HEADER_BYTES}", got=len(data)
        )
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise HeaderError("cannot read the JSON", where=where, got=error) from error
    if not isinstance(content, dict):
        raise HeaderError(
            "not a JSON object", where=where, expected="{…}", got=type(content).__name__
        )
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_same_identity(
    stored: dict[str, Any],
    wanted: dict[str, Any],
    *,
    where: str,
    what: str = "store",
    todo: str = "dump into a new folder, or repeat the settings of the first run to resume it",
) -> None:
    """StoreMismatchError naming the first field in which two identities of a ``what`` differ."""
    difference = first_difference(stored, wanted)
    if difference is None:
        return
    name, old, new = difference
    raise StoreMismatchError(
        f"the {what} was made with another configuration: {name} differs",
        where=where,
        expected=f"{name} = {old!r} (in the {what})",
        got=f"{name} = {new!r} (in this run)",
        todo=todo,
    )


def first_difference(old: Any, new: Any, *, name: str = "") -> tuple[str, Any, Any] | None:
    """The dotted name and both values of the first field in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            inner = f"{name}.{key}".lstrip(".")
            found = first_difference(old.get(key), new.get(key), name=inner)
            if found:
                return found
        return None
    return None if old == new else (name, old, new)


def _checked_version(version: Any, where: str) -> str:
    """The version if its major number is ours: a later minor one names what it adds as features."""
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    ours = int(FORMAT_VERSION.partition(".")[0])
    if match is None or int(match[1]) != ours:
        major = re.match(r"[0-9]{1,9}(?=[.])", str(version))
        later = major is not None and int(major[0]) > ours
        raise HeaderError(
            f"format version {version!r} is not one that this kdstore reads",
            where=where,
            expected=f"major version {ours}, such as {FORMAT_VERSION}",
            got=version,
            todo="install a newer kdstore" if later else "dump the store again",
        )
    return str(version)


def _features(content: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = content.get(name)
    if not isinstance(value, list) or not all(isinstance(feature, str) for feature in value):
        raise HeaderError(f"{name} is no list of names", where=where, expected="[…]", got=value)
    return tuple(value)


def _check_features(header: Header, where: str) -> None:
    for feature in header.reader_features:
        if feature not in KNOWN_FEATURES:
            raise HeaderError(
                f"the store needs the feature {feature!r}, which this kdstore does not know",
                where=where,
                expected=f"only {sorted(KNOWN_FEATURES)}",
                got=feature,
                todo="install a newer kdstore",
            )


def _object(content: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    value = content.get(name)
    if not isinstance(value, dict):
        raise HeaderError(
            f"the header has no object {name!r}", where=where, expected=name, got=value
        )
    return value


def _checked_digest(header: Header, where: str) -> str:
    try:
        return header.config_digest
    except (ValueError, RecursionError) as error:  # an infinite number, half a character, depth
        raise HeaderError("the identity has no canonical JSON", where=where, got=error) from error


def check_plan(header: Header, where: str) -> None:
    """HeaderError unless the plan has a number of units, and the identity a seed."""
    units, seed = header.plan.get("units"), header.identity.get("seed")
    if type(units) is not int or not 0 <= units <= MAX_UNITS:
        raise HeaderError(
            "plan.units is no count", where=where, expected=f"0 to {MAX_UNITS}", got=units
        )
    if type(seed) is not int:
        raise HeaderError("identity.seed is missing", where=where, expected="int", got=seed)


def check_names(names: Any, *, what: str, where: str) -> None:
    """HeaderError unless a list holds names, and not too many."""
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not named or len(names) > MAX_SCALARS or len(set(names)) < len(names):
        raise HeaderError(
            f"{what} are no names", where=where, expected=f"at most {MAX_SCALARS}, none twice"
        )


def _check_fields(header: Header, where: str) -> None:
    check_plan(header, where)
    signals, vocab_size = header.identity.get("signals"), header.identity.get("vocab_size")
    if type(vocab_size) is not int or not 0 < vocab_size <= 1 << 24:
        raise HeaderError(
            "identity.vocab_size is no vocabulary size",
            where=where,
            expected=f"1 to {1 << 24}",
            got=vocab_size,
        )
    _check_signals(signals, where)
    for name in ("plan_digest", "id_order_digest", "vocab_digest", "tokenizer_digest"):
        value = header.identity.get(name)
        if not isinstance(value, str):
            raise HeaderError(
                f"identity.{name} is missing", where=where, expected="a digest", got=value
            )


def _checked_files(files: dict[str, Any], where: str) -> dict[str, str]:
    for path, digest in files.items():
        leaves = any(part in ("", ".", "..") for part in path.split("/"))
        if not isinstance(digest, str) or leaves or _FOREIGN.search(path):
            raise HeaderError(
                "the header names a file that leaves the store",
                where=where,
                expected="a relative path and its SHA-256",
                got=(path, digest),
            )
    return files


def _check_signals(signals: Any, where: str) -> None:
    named = isinstance(signals, dict) and signals
    fields = {"selection": str, "codec": str, "scalars": list}
    for name, signal in signals.items() if named else [("?", None)]:
        audit_fields = {"fraction": float} if name == AUDIT_SIGNAL else {}
        for field_name, kind in {**fields, **audit_fields}.items():
            value = signal.get(field_name) if isinstance(signal, dict) else None
            if not isinstance(value, kind):
                raise HeaderError(
                    f"the header does not describe signal {name!r}",
                    where=where,
                    expected=f"signals.{name}.{field_name}, a {kind.__name__}",
                    got=value,
                )
        scalars = signal["scalars"] if isinstance(signal, dict) else None
        check_names(scalars, what=f"signals.{name}.scalars", where=where)
