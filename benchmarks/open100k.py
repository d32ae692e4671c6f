"""What it costs to open a store of 100,000 shards, 10^12 tokens: time and memory of the reader.

The store is sealed and has no shards: a header and a manifest, whose commits are like those of a
dump by the hf teacher. It is opened in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import kdstore
from benchmarks.figures import machine, print_figure
from kdstore.codecs.rows import PLAIN_COLUMNS
from kdstore.commit import Commit, ShardRecord
from kdstore.filesystem import Folder
from kdstore.hashing import sha256_hex
from kdstore.header import Header
from kdstore.layout import HEADER, MAIN_SIGNAL, manifest_path, shard_path
from kdstore.manifest import manifest_bytes

UNITS, UNIT_TOKENS, UNIT_ROWS = 100_000, 10_000_000, 5_000
ROUNDS = 5
_OPEN = """
import json, pickle, sys, time
from pathlib import Path
started = time.perf_counter()
import kdstore
opened = kdstore.open
imported = time.perf_counter()
store = opened(sys.argv[1])
done = time.perf_counter()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "seconds": done - imported,
    "seconds_with_imports": done - started,
    "megabytes": int(status["VmHWM"].split()[0]) * 1024 / 1e6,
    "pickled_megabytes": len(pickle.dumps(store)) / 1e6,
    "samples": len(store),
    "tokens": int(store.shard_tokens.sum()),
    "complete": store.is_complete,
}))
"""


def make_store(folder: Folder, units: int) -> None:
    """Write a header, and the manifest of all units."""
    digests = ("vocab_digest", "tokenizer_digest", "plan_digest", "id_order_digest")
    signal = {
        "selection": "pps:tau=0.06",
        "codec": "pps/1",
        "scalars": ["label_logprob", "label_rank", "entropy"],
        "scored": "supervised",
    }
    identity: dict[str, Any] = {
        "teacher": {"name": "teacher", "revision": "0", "dtype": "bfloat16"},
        "vocab_size": 151_936,
        **{name: sha256_hex(name.encode()) for name in digests},
        "signals": {MAIN_SIGNAL: signal},
        "columns": [name for name in PLAIN_COLUMNS if name != "messages"],
        "seed": 0,
    }
    header = Header(identity, {"kind": "fixed", "units": units}, {})
    folder.create(HEADER, header.to_bytes())
    commits = list(_commits(units, header.config_digest))
    folder.replace(manifest_path(units), manifest_bytes(commits))


def _commits(units: int, digest: str) -> Iterator[Commit]:
    random = np.random.default_rng(0)
    for unit in range(units):
        tokens = UNIT_TOKENS + int(random.integers(UNIT_ROWS))
        scored = tokens - UNIT_ROWS
        shard = ShardRecord(
            path=shard_path(unit, random.bytes(4).hex()),
            bytes=12 * tokens + int(random.integers(tokens)),
            rows=UNIT_ROWS,
            tokens=tokens,
            scored=scored,
            xxh3_128=random.bytes(16).hex(),
            footer_bytes=50_000 + int(random.integers(1_000)),
            footer_xxh3=random.bytes(8).hex(),
        )
        statistics = {
            "entries": 7 * scored + int(random.integers(scored)),
            "kept_mass": scored * random.random(),
            "scalar_sums": {
                "label_logprob": -scored * random.random(),
                "entropy": scored * random.random(),
            },
            "audited": 0,
        }
        provenance = {
            "kdstore": kdstore.__version__,
            "seconds": round(600 * random.random(), 3),
            "finished": "2026-01-01T00:00:00Z",
            "backend": "hf",
            "device": "cuda:0",
            "torch": "2.9.0",
            "transformers": "4.57.1",
            "padding_mass": 1e-7 * random.random(),
        }
        yield Commit(unit, shard, digest, statistics, provenance)


def measure(path: Path) -> dict[str, Any]:
    """What a fresh process says of opening the store."""
    result = subprocess.run(
        [sys.executable, "-c", _OPEN, str(path)], capture_output=True, text=True, check=True
    )
    return dict(json.loads(result.stdout))


def main() -> None:
    """Make the store in a temporary folder, open it, print figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=UNITS)
    units = parser.parse_args().units
    with tempfile.TemporaryDirectory() as temporary:
        make_store(Folder(temporary), units)
        found = [measure(Path(temporary)) for _ in range(ROUNDS)]
        size = (Path(temporary) / manifest_path(units)).stat().st_size
    first = found[0]
    if not first["complete"] or first["samples"] != units * UNIT_ROWS:
        raise AssertionError(f"the store was not read as it was made: {first}")
    more = {"machine": machine(), "units": units, "tokens": first["tokens"], "rounds": ROUNDS}
    more["manifest_megabytes"] = size / 1e6
    names = ("seconds", "seconds_with_imports", "megabytes", "pickled_megabytes")
    for name, unit in zip(names, ("s", "s", "MB", "MB"), strict=True):
        print_figure(f"load.open100k.{name}", median(one[name] for one in found), unit, **more)


if __name__ == "__main__":
    main()
