"""Whether a dump's memory grows with its corpus: peak RSS, for one text and for ten times as much.

Each is dumped by ``kdstore dump`` in a process of its own, with the tiny teacher, in units of the
same size: several, and ten times as many. The figure is the ratio of the peaks, minus one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import machine, print_figure

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny"
PIECE_CHARS = 1000
TIMES = 10


def pieces() -> list[str]:
    """The teacher's text in pieces of equal length."""
    lines = (EXAMPLE / "text/teacher.jsonl").read_text(encoding="utf-8").splitlines()
    text = " ".join(json.loads(line)["text"] for line in lines)
    return [text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]


def dump(texts: list[str], folder: Path, *, unit_tokens: int) -> dict[str, Any]:
    """The summary of a dump in a new process, with its ``peak_bytes``."""
    folder.mkdir()
    data = folder / "texts.jsonl"
    rows = (json.dumps({"id": f"piece-{n}", "text": text}) for n, text in enumerate(texts))
    data.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "kdstore_cli.main", "dump", "--quiet", "--json"]
    command += ["--teacher", str(EXAMPLE / "teacher"), "--data", str(data)]
    command += ["--out", str(folder / "store"), "--unit-tokens", str(unit_tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the dump of {len(texts)} texts failed: {process.returncode}")
    summary: dict[str, Any] = json.loads(output)
    return {**summary, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    """Measure both dumps and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under half of the text, small units")
    options = parser.parse_args()
    texts = pieces()
    count = 75 if options.quick else len(texts) // TIMES
    unit_tokens = 5_000 if options.quick else 10_000
    with tempfile.TemporaryDirectory(prefix="kdstore-") as folder:
        short, long = (
            dump(texts[:size], Path(folder) / str(size), unit_tokens=unit_tokens)
            for size in (count, TIMES * count)
        )
    context = {"unit_tokens": unit_tokens, "machine": machine()}
    for name, found in (("short", short), ("long", long)):
        more = {key: found[key] for key in ("tokens", "units", "tokens_per_s")}
        print_figure(f"dump.peak_rss.{name}", found["peak_bytes"] / 1e6, "MB", **more, **context)
    growth = long["peak_bytes"] / short["peak_bytes"] - 1
    times = long["tokens"] / short["tokens"]
    print_figure("dump.rss_growth", growth, "of the peak", times_longer=times, **context)


if __name__ == "__main__":
    main()
