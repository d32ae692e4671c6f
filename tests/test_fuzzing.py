"""A few hundred mutations of golden stores; ``benchmarks/fuzz.py`` runs as many as wanted."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from tests.fuzzing import GOOD, run
from tests.mutations import mutation

MUTATIONS = 400
DYING = """
import json, os, sys, time
for seed in range(*map(int, sys.argv[1:])):
    if seed == 4:
        os.abort()
    if seed == 6:
        time.sleep(60)
    print(json.dumps({"seed": seed, "outcome": "refused"}), flush=True)
"""


def test_mutated_stores_are_refused_or_read_right() -> None:
    """No other error, no crash, nothing slow, and no byte that changes what is read unseen."""
    found = list(run(0, MUTATIONS, timeout_s=60))
    assert sorted(result["seed"] for result in found) == list(range(MUTATIONS))
    assert [result for result in found if result["outcome"] not in GOOD] == []
    assert max(result["seconds"] for result in found) < 20
    kinds = Counter((result["kind"], result["outcome"]) for result in found)
    for kind in ("shard bytes", "file bytes", "cells", "parquet", "pages", "identity", "fields"):
        assert kinds[kind, "refused"] >= 5, kind
    assert kinds["cells", "plausible"] >= 3


def test_a_seed_says_what_it_does() -> None:
    ones, others = ([mutation(seed) for seed in range(50)] for _ in range(2))
    assert [(m.store, m.kind) for m in ones] == [(m.store, m.kind) for m in others]
    assert len({(m.store, m.kind) for m in ones}) > 20


def test_workers_that_die_or_hang_are_found_by_their_seed(tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(DYING)
    found = list(run(2, 9, program=(sys.executable, str(program)), timeout_s=3))
    outcomes = [(result["seed"], result["outcome"]) for result in found]
    want = {4: "crashed", 6: "hung"}
    assert outcomes == [(seed, want.get(seed, "refused")) for seed in range(2, 9)]
