"""Runs mutations in processes of their own, so that one that dies or hangs is found by its seed.

``python -m tests.fuzzing FIRST END STEP`` is the worker: a line of JSON for each seed.
"""

from __future__ import annotations

import hashlib
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import kdstore
from kdstore.errors import KDStoreError
from kdstore.readers.stats import store_stats
from kdstore.readers.verify import verify_store
from kdstore.sample import Sample
from tests.hostile import check_sane, copy_store, read_all
from tests.mutations import mutation

PROGRAM = (sys.executable, "-m", "tests.fuzzing")
GOOD = ("refused", "same", "plausible")
_ADDRESSES = 3 << 30
_ROOT = Path(__file__).parents[1]


def digest(samples: list[Sample]) -> str:
    """A digest of all that samples say."""
    found = hashlib.sha256()
    for sample in samples:
        signal = sample.signal
        assert signal is not None
        found.update(repr([sample.sample_id, sample.runs, sample.spans, sample.text]).encode())
        found.update(repr([sample.messages, sample.metadata]).encode())
        arrays = [sample.input_ids_T, signal.indptr, signal.ids_N, signal.logprobs_N, signal.rest_S]
        arrays += [signal.scalars[name] for name in sorted(signal.scalars)]
        for array in arrays:
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def outcome(seed: int, stores: Path, wanted: dict[str, str]) -> dict[str, Any]:
    """What becomes of a seed's mutation; ``wanted`` has the digests of the stores as they were."""
    change = mutation(seed)
    original, store = stores / change.store, stores / "mutated"
    if not original.exists():
        copy_store(change.store, original)
        wanted[change.store] = digest(read_all(original))
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(original, store)
    result: dict[str, Any] = {"seed": seed, "store": change.store, "kind": change.kind}
    started = time.monotonic()
    try:
        change.apply(store)
        result["outcome"] = _read(store, seed, wanted[change.store], hides=change.hides)
    except KDStoreError:
        result["outcome"] = "refused"
    except Exception:
        result |= {"outcome": "failed", "error": traceback.format_exc()}
    return {**result, "seconds": round(time.monotonic() - started, 3)}


def _read(store: Path, seed: int, wanted: str, *, hides: bool) -> str:
    if seed % 4 == 0:
        opened = kdstore.open(store)
        verify_store(opened)
        store_stats(opened)
    samples = read_all(store)
    if digest(samples) == wanted:
        return "same"
    if not hides:
        return "changed unseen"
    check_sane(samples, kdstore.open(store).vocab_size)
    return "plausible"


def work(seeds: range) -> None:
    """Print the outcome of each seed as a line of JSON."""
    _limit_memory()
    wanted: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="kdstore-fuzz-") as folder:
        for seed in seeds:
            print(json.dumps(outcome(seed, Path(folder), wanted)), flush=True)


def _limit_memory() -> None:
    """3 GiB of addresses beyond those of the program, where the system can say so."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + _ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(
    first: int, end: int, *, workers: int = 1, program: Sequence[str] = PROGRAM, timeout_s: int = 30
) -> Iterator[dict[str, Any]]:
    """The outcomes of all seeds of a range, as they come; ``crashed`` and ``hung`` among them.

    ``program`` gets the first seed, the end and the step as arguments.
    """
    results: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threads = [
        threading.Thread(
            target=_watch,
            args=(range(first + worker, end, workers), results, [*program], timeout_s),
            daemon=True,
        )
        for worker in range(workers)
    ]
    for thread in threads:
        thread.start()
    for _ in range(workers):
        yield from iter(results.get, None)


def _watch(
    seeds: range, results: queue.Queue[dict[str, Any] | None], program: list[str], timeout_s: int
) -> None:
    """Keep a worker at work, started anew after each seed that it does not survive."""
    while seeds:
        command = [*program, *map(str, (seeds.start, seeds.stop, seeds.step))]
        with subprocess.Popen(
            command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            while seeds:
                timer = threading.Timer(timeout_s, process.kill)
                timer.start()
                line = process.stdout.readline()
                late = timer.finished.is_set() and not line
                timer.cancel()
                if line:
                    results.put(json.loads(line))
                else:
                    process.wait()
                    name = "hung" if late else "crashed"
                    results.put({"seed": seeds[0], "outcome": name, "error": process.returncode})
                seeds = seeds[1:]
                if not line:
                    break
    results.put(None)


if __name__ == "__main__":
    work(range(*map(int, sys.argv[1:])))
