"""Rebuild `text/*.jsonl` from the King James text that Debian packages as `bible-kjv-text`.

Needs the program `bible` (package `bible-kjv`). The output depends on nothing else: the same
package gives the same bytes. One row is one chapter as running prose, without verse numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

MAX_TOTAL_BYTES = 2_000_000

# Mostly narrative, so that a small model has one register to learn, and as many books as the
# limit above holds. Left out: laws and lists (Leviticus, Numbers), verse (Psalms to Isaiah),
# and Chronicles, which repeats Samuel and Kings.
BOOKS = {
    "Ge": "genesis",
    "Exo": "exodus",
    "Deu": "deuteronomy",
    "Josh": "joshua",
    "Jdgs": "judges",
    "Ruth": "ruth",
    "1Sm": "1-samuel",
    "2Sm": "2-samuel",
    "1Ki": "1-kings",
    "2Ki": "2-kings",
    "Est": "esther",
    "Dan": "daniel",
    "Jonah": "jonah",
    "Mat": "matthew",
    "Mark": "mark",
    "Luke": "luke",
    "John": "john",
    "Acts": "acts",
    "Rev": "revelation",
}

# Chapters are dealt out by their running number modulo 24, which spreads every split evenly
# over the books: 2/24 for the student, 1/24 held out, the rest for the teacher.
DEAL = 24
STUDENT_REMAINDERS = frozenset({5, 17})
HELDOUT_REMAINDERS = frozenset({11})

VERSE = re.compile(r"^(\d?[A-Za-z]+)(\d+):\d+ (.*)$")


def read_verses(program: str) -> list[str]:
    """Every verse of the text in order, one line each, such as `Ge1:3 And God said, ...`."""
    command = [program, "-f", "gen1:1-rev22:21"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def join_chapters(verses: Iterable[str]) -> dict[str, str]:
    """Chapter id (`genesis-1`) to running prose, for the chapters of `BOOKS`, in order.

    Raises:
        ValueError: a line is not a verse, so the program prints another format than expected.
    """
    chapters: dict[str, list[str]] = {}
    for line in verses:
        match = VERSE.match(line)
        if match is None:
            raise ValueError(f"expected a line like 'Ge1:3 And God said', got {line!r}")
        book, chapter, prose = match.groups()
        if book in BOOKS:
            chapters.setdefault(f"{BOOKS[book]}-{chapter}", []).append(prose)
    return {name: " ".join(" ".join(parts).split()) for name, parts in chapters.items()}


def split_of(number: int) -> str:
    """Name of the split that the chapter with this running number belongs to."""
    if number % DEAL in STUDENT_REMAINDERS:
        return "student"
    return "heldout" if number % DEAL in HELDOUT_REMAINDERS else "teacher"


def split_rows(chapters: dict[str, str]) -> dict[str, list[str]]:
    """Split name to its JSON lines."""
    splits: dict[str, list[str]] = {"teacher": [], "student": [], "heldout": []}
    for number, (name, prose) in enumerate(chapters.items()):
        splits[split_of(number)].append(json.dumps({"id": name, "text": prose}) + "\n")
    return splits


def write_splits(splits: dict[str, list[str]], *, out: Path) -> None:
    """Write one file per split into the folder `out`.

    Raises:
        ValueError: the files would together pass `MAX_TOTAL_BYTES`.
    """
    blobs = {name: "".join(rows).encode() for name, rows in splits.items()}
    total = sum(map(len, blobs.values()))
    if total > MAX_TOTAL_BYTES:
        raise ValueError(f"the text has {total} bytes, limit {MAX_TOTAL_BYTES}; drop a book")
    out.mkdir(parents=True, exist_ok=True)
    for name, blob in blobs.items():
        (out / f"{name}.jsonl").write_bytes(blob)
        print(f"{name}.jsonl: {len(splits[name])} chapters, {len(blob)} bytes")


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "text")
    parser.add_argument("--program", default="bible", help="the program of package bible-kjv")
    arguments = parser.parse_args()
    write_splits(split_rows(join_chapters(read_verses(arguments.program))), out=arguments.out)


if __name__ == "__main__":
    main()
