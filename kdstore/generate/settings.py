"""What completions are made of and by: the file that a folder of them begins with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Self

from kdstore.errors import HeaderError
from kdstore.filesystem import Folder
from kdstore.hashing import json_digest
from kdstore.header import MAX_HEADER_BYTES, check_same_identity, parse_json_object
from kdstore.layout import GENERATION

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """``identity`` says what the completions are, the rest what reading all prompts once has told.

    ``num_prompts`` have room for an answer, of ``num_rows`` rows; ``num_too_long`` have not.
    """

    identity: dict[str, Any]
    num_rows: int
    num_prompts: int
    num_too_long: int

    @property
    def num_blocks(self) -> int:
        """Blocks of ``block_rows`` rows of the source, the last one perhaps of fewer."""
        return -(-self.num_rows // int(self.identity["block_rows"]))

    def to_bytes(self) -> bytes:
        """Deterministic JSON, for people and programs."""
        content = {"version": VERSION, "digest": json_digest(self.identity), **vars(self)}
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Self:
        """The settings in a file; HeaderError if it is damaged or of another version."""
        content = parse_json_object(data, where=where)
        if content.pop("version", None) != VERSION:
            raise HeaderError(
                "completions of another version",
                where=where,
                expected=VERSION,
                got=json.loads(data).get("version"),
                todo="use the kdstore that they were made with, or dump into a new folder",
            )
        digest = content.pop("digest", None)
        kinds = {name: type(value).__name__ for name, value in content.items()}
        if kinds != cls.__annotations__ | {"identity": "dict"} or digest != json_digest(
            content["identity"]
        ):
            raise HeaderError(
                "the settings of completions are damaged",
                where=where,
                expected=f"{', '.join(cls.__annotations__)}, and the digest {digest}",
                got=", ".join(kinds),
                todo="restore the file from a backup; it is never edited by hand",
            )
        return cls(**content)


def read_settings(folder: Folder, wanted: dict[str, Any]) -> Settings:
    """The settings in a store's folder; StoreMismatchError, naming a field, if others are wanted.

    Raises FileNotFoundError if there are none.
    """
    where = folder.location(GENERATION)
    data = folder.read(GENERATION, max_bytes=MAX_HEADER_BYTES)
    settings = Settings.from_bytes(data, where=where)
    check_same_identity(settings.identity, wanted, where=where, what="set of completions")
    return settings
