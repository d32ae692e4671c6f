"""JSON lines: one JSON object a line, optionally compressed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kdstore.errors import InputError
from kdstore.inputs.base import Row
from kdstore.inputs.files import FileSource, InputFile

_BOM = b"\xef\xbb\xbf"


class JsonLinesSource(FileSource):
    """Rows of ``.jsonl`` or ``.json`` files, also ``.gz``, ``.zst``, ``.bz2`` and ``.xz``.

    Blank lines are no rows, but count as lines in messages. Raises InputError, naming file and
    line, for malformed JSON, a value that is not an object and bytes that are not UTF-8.
    """

    kind = "jsonl"

    def _rows_from(self, start: int) -> Iterator[Row]:
        skipped = 0
        for file, line_number, line in self._lines():
            if skipped < start:
                skipped += 1
            else:
                yield _parse(line, f"{file.location}, line {line_number}")

    def locate(self, row: int) -> str:
        """File and line of a row; reads up to it."""
        for number, (file, line_number, _) in enumerate(self._lines()):
            if number == row:
                return f"{file.location}, line {line_number}"
        return super().locate(row)

    def _lines(self) -> Iterator[tuple[InputFile, int, bytes]]:
        for file in self.files:
            with file.open(decompress=True) as stream:
                for line_number, line in enumerate(stream, 1):
                    content = line.removeprefix(_BOM) if line_number == 1 else line
                    if not content.isspace() and content:
                        yield file, line_number, content


def _parse(line: bytes, where: str) -> Row:
    text = decode_utf8(line, where)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            "malformed JSON",
            where=where,
            expected="one JSON object",
            got=f"{error} in {_excerpt(text)}",
            todo="write one JSON object a line, with no line breaks inside and no list around them",
        ) from error
    if not isinstance(value, dict):
        raise _not_an_object(value, where)
    if "\\ud" in text.lower():  # only an escape can smuggle half a surrogate pair in
        _check_unicode(value, where)
    return value


def _check_unicode(value: dict[str, Any], where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            "text that is not Unicode",
            where=where,
            expected="surrogates in pairs only",
            got=f"{error.object[error.start]!a}",
            todo="repair the text where it was cut or decoded",
        ) from error


def _not_an_object(value: Any, where: str) -> InputError:
    return InputError(
        "a line that is not a JSON object",
        where=where,
        expected='an object such as {"text": "..."}',
        got=f"{type(value).__name__}: {_excerpt(repr(value))}",
        todo="write one JSON object a line; a list of objects has to be unpacked",
    )


def decode_utf8(data: bytes, where: str) -> str:
    """The text of UTF-8 bytes. Raises InputError with the offending byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "invalid UTF-8",
            where=f"{where}, byte {error.start + 1}",
            expected="UTF-8",
            got=f"byte 0x{data[error.start]:02x} ({error.reason})",
            todo="convert the file to UTF-8, for example with iconv",
        ) from error


def _excerpt(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
