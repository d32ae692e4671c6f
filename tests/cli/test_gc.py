"""gc removes what no commit names, once it is old, and nothing else."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]

ORPHANS = ("data/part-000001-0123abcd.parquet", ".plan.parquet.0123abcd.partial")


def leave_orphans(store: Path, *, hours: float) -> None:
    for name in ORPHANS:
        (store / name).write_bytes(b"half")
        then = time.time() - 3600 * hours
        os.utime(store / name, (then, then))


def files_of(store: Path) -> set[Path]:
    return {path for path in store.rglob("*") if path.is_file()}


def test_old_orphans_go_and_everything_else_stays(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    before = files_of(store)
    leave_orphans(store, hours=30)
    code, output, _ = kdstore_cli("gc", store, "--dry-run", "--json")
    assert code == 0
    assert {orphan["path"] for orphan in json.loads(output)["orphans"]} == set(ORPHANS)
    assert files_of(store) > before
    assert kdstore_cli("gc", store)[:2] == (0, output_of(ORPHANS))
    assert files_of(store) == before
    assert kdstore_cli("verify", "--quiet", store)[0] == 0


def output_of(names: tuple[str, ...]) -> str:
    lines = [f"{name}  4 bytes" for name in names]
    return "\n".join([*lines, f"{len(names)} orphans removed, {4 * len(names)} bytes", ""])


def test_young_orphans_stay(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    leave_orphans(store, hours=1)
    before = files_of(store)
    assert kdstore_cli("gc", store)[0] == 0
    assert files_of(store) == before


def test_gc_of_no_store_is_refused(tmp_path: Path, kdstore_cli: Run) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, error = kdstore_cli("gc", tmp_path, "--older-than", "0")
    assert code == 1
    assert "kdstore: error:" in error
    assert (tmp_path / "thesis.txt").exists()
