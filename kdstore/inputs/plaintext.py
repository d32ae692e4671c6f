"""Plain text: one document per file."""

from __future__ import annotations

from collections.abc import Iterator

from kdstore.inputs.base import Row
from kdstore.inputs.files import FileSource, InputFile
from kdstore.inputs.jsonlines import decode_utf8

_BOM = b"\xef\xbb\xbf"


class PlainTextSource(FileSource):
    """One row ``{"text": ...}`` per ``.txt`` file: a file is one document, never one per line.

    The text is kept as it is, line ends included. Empty files are rows with an empty text; if all
    are empty, there are no rows. Raises InputError with file and line for invalid UTF-8.
    """

    kind = "text"

    def _rows_from(self, start: int) -> Iterator[Row]:
        texts = self.files[start:]
        if start == 0 and all(file.fs.size(file.path) == 0 for file in self.files):
            return
        for file in texts:
            yield {"text": _read(file)}

    def locate(self, row: int) -> str:
        """The file of a row."""
        return self.files[row].location if row < len(self.files) else super().locate(row)


def _read(file: InputFile) -> str:
    with file.open(decompress=True) as stream:
        data = stream.read().removeprefix(_BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        line_start = data.rfind(b"\n", 0, error.start) + 1
        line_end = data.find(b"\n", error.start)
        line = data[line_start : None if line_end < 0 else line_end]
        return decode_utf8(line, f"{file.location}, line {number}")
