"""Running records: written when a unit is taken up, gone when it is committed, never in the way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdstore
from kdstore.errors import StorageError
from kdstore.filesystem import Folder
from kdstore.layout import RUNNING, running_path
from kdstore.writers.trace import MAX_ERROR_CHARS, Tracer, read_traces
from tests.writers.pipelines import Work

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def test_a_record_lives_from_start_to_done(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    tracer = Tracer(folder)
    for unit in (3, 4, 5):
        tracer.start(unit)
    tracer.done(4)
    tracer.failed(5, ValueError("x" * 5000))
    third, fifth = read_traces(folder, committed={9})
    assert (third.unit, third.pid, third.error) == (3, os.getpid(), None)
    assert abs(third.since_s - time.time()) < 60
    assert (fifth.unit, fifth.error) == (5, f"ValueError: {'x' * 5000}"[:MAX_ERROR_CHARS])
    assert read_traces(folder, committed={3, 5}) == []
    tracer.close()
    assert [trace.unit for trace in read_traces(folder, committed=())] == [5]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"host": "a", "pid": "x"}'])
def test_damaged_records_are_left_out(tmp_path: Path, content: bytes) -> None:
    Tracer(Folder(tmp_path)).start(1)
    (tmp_path / running_path(2)).write_bytes(content)
    (tmp_path / RUNNING / "notes.txt").write_bytes(content)
    assert [trace.unit for trace in read_traces(Folder(tmp_path), committed=())] == [1]


def test_storage_that_refuses_records_is_no_failure(
    tmp_path: Path, teacher_dir: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> None:
        raise StorageError("no room")

    one = Work.at(Folder(tmp_path / "store"), teacher_dir, data_file)
    for name in ("replace", "remove"):
        monkeypatch.setattr(one.writer.folder, name, refused)
    assert one.run().units == one.writer.header.num_units


def test_status_tells_what_runs_failed_and_is_left(dump: Dump, kdstore_cli: Run) -> None:
    store = dump(unit="0/3")
    num_units, done = kdstore.open(store).header.num_units, len(kdstore.open(store).commits)
    tracer = Tracer(Folder(store))
    tracer.start(0)  # committed, whatever its record says
    tracer.start(1)
    tracer.start(2)
    tracer.failed(4, RuntimeError("CUDA out of memory"))
    old = json.loads((store / running_path(2)).read_text())
    (store / running_path(2)).write_text(json.dumps({**old, "since_s": time.time() - 5 * 3600}))
    found = json.loads(kdstore_cli("status", "--json", store)[1])
    keys = ("units", "units_running", "units_stale", "units_failed", "units_left", "workers")
    assert [found[key] for key in keys] == [done, 1, 1, 1, num_units - done - 3, 1]
    assert [record["unit"] for record in found["records"]] == [1, 2, 4]
    assert found["records"][2]["error"] == "RuntimeError: CUDA out of memory"
    commits = kdstore.open(store).commits
    seconds = sum(c.provenance["seconds"] + c.provenance["wait_seconds"] for c in commits)
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / seconds)
    left = found["tokens_planned"] - found["tokens"]
    assert found["eta_s"] == pytest.approx(left / found["tokens_per_s"])
    code, output, _ = kdstore_cli("status", "--stale-after", "9", store)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in output.splitlines() if line[:5] != "unit ")
    assert (lines["units_running"], lines["units_stale"]) == ("2", "0")
    assert "unit 4" in output
    assert "CUDA out of memory" in output
    assert f"process {os.getpid()}" in output


def test_status_of_what_nobody_works_on_has_no_rate(dump: Dump, kdstore_cli: Run) -> None:
    found = json.loads(kdstore_cli("status", "--json", dump())[1])
    assert (found["tokens_per_s"], found["eta_s"], found["records"]) == (None, None, [])
    assert found["tokens"] == found["tokens_planned"]
    assert found["units_left"] == 0


def test_readers_and_resume_do_not_care(dump: Dump, kdstore_cli: Run) -> None:
    store = dump(unit="0/2")
    before = kdstore.open(store)
    Tracer(Folder(store)).failed(1, RuntimeError("no"))
    after = kdstore.open(store)
    assert (after.config_digest, len(after)) == (before.config_digest, len(before))
    dump()
    assert not (store / RUNNING).exists()
    assert kdstore_cli("verify", "--quiet", store)[0] == 0


def test_gc_removes_old_records(dump: Dump, kdstore_cli: Run) -> None:
    store = dump(unit="0/2")
    tracer = Tracer(Folder(store))
    for unit, hours in ((1, 30), (3, 1)):
        tracer.start(unit)
        then = time.time() - 3600 * hours
        os.utime(store / running_path(unit), (then, then))
    assert kdstore_cli("gc", store)[0] == 0
    assert [trace.unit for trace in read_traces(Folder(store), committed=())] == [3]
