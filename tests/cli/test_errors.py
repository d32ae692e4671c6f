"""Every user error is one message, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kdstore
from kdstore.errors import UsageError
from tests.conftest import write_jsonl

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]

GOOD = {"id": "a", "text": "in the beginning"}


def assert_refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    got, _, error = result
    assert got == code, error
    assert error.count("kdstore: error:") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error


def dump_of(
    run: Run, teacher: Path, data: object, out: Path, *options: object
) -> tuple[int, str, str]:
    return run("dump", "--quiet", "--teacher", teacher, "--data", data, "--out", out, *options)


def test_missing_teacher(kdstore_cli: Run, data_file: Path, tmp_path: Path) -> None:
    result = dump_of(kdstore_cli, tmp_path / "none", data_file, tmp_path / "out")
    assert_refused(result, 1, "no teacher here", "none", "to do")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_teacher(kdstore_cli: Run, data_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = dump_of(kdstore_cli, tmp_path / "empty", data_file, tmp_path / "out")
    assert_refused(result, 1, "config.json")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["no rows"]),
        ([json.dumps(GOOD), "{not json"], ["line 2"]),
        ([json.dumps(GOOD), json.dumps({"id": "b", "url": "x"})], ["line 2", "url", "input_ids"]),
        ([json.dumps(GOOD), json.dumps(GOOD)], ["'a'", "rows 0 and 1"]),
        ([json.dumps({"input_ids": [1, 2, 384]})], ["384", "0 to 383"]),
        ([json.dumps({"input_ids": [1, -2]})], ["-2"]),
        ([json.dumps({"id": "half \ud800", "text": "x"})], ["line 1", "surrogates"]),
        ([json.dumps({"text": "x", "metadata": {"score": float("nan")}})], ["metadata"]),
        ([json.dumps({"messages": [{"role": "user", "content": "hi"}]})], ["chat template"]),
    ],
)
def test_bad_rows(
    kdstore_cli: Run, teacher_dir: Path, tmp_path: Path, lines: list[str], words: list[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(line + "\n" for line in lines))
    result = dump_of(kdstore_cli, teacher_dir, data, tmp_path / "out")
    assert_refused(result, 1, *words)
    assert not (tmp_path / "out").exists()


def test_missing_data(kdstore_cli: Run, teacher_dir: Path, tmp_path: Path) -> None:
    result = dump_of(kdstore_cli, teacher_dir, tmp_path / "no.jsonl", tmp_path / "out")
    assert_refused(result, 1, "no.jsonl")


def test_a_larger_tokenizer_only_warns(
    kdstore_cli: Run, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_dir, teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(200)])
    tokenizer.save_pretrained(teacher)
    code, _, error = dump_of(kdstore_cli, teacher, data_file, tmp_path / "out")
    assert code == 0
    assert "warning" in error
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the <extra-199> word"}])
    assert_refused(dump_of(kdstore_cli, teacher, data, tmp_path / "two"), 1, "outside the teacher")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--select", "topk:k=4"], "signals.main"),
        (["--seed", "1"], "seed"),
        (["--max-length", "30"], "input.max_length"),
        (["--unit-tokens", "501"], "unit_tokens"),
        (["--score", "all"], "scored"),
        (["--dtype", "bfloat16"], "teacher.dtype"),
    ],
)
def test_another_configuration_is_refused_by_its_field(
    dump: Dump, kdstore_cli: Run, teacher_dir: Path, data_file: Path, options: list[str], field: str
) -> None:
    store = dump()
    before = sorted(store.rglob("*"))
    base = ["--unit-tokens", "500"]
    result = dump_of(kdstore_cli, teacher_dir, data_file, store, *base, *options)
    assert_refused(result, 1, field)
    assert sorted(store.rglob("*")) == before


def test_another_source_is_refused(
    dump: Dump, kdstore_cli: Run, teacher_dir: Path, tmp_path: Path
) -> None:
    store = dump()
    data = write_jsonl(tmp_path / "texts.jsonl", [GOOD])
    result = dump_of(kdstore_cli, teacher_dir, data, store, "--unit-tokens", "500")
    assert_refused(result, 1, "source")


def test_a_folder_with_other_files_is_refused(
    kdstore_cli: Run, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert_refused(dump_of(kdstore_cli, teacher_dir, data_file, tmp_path), 2, "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "options",
    [
        ["--select", "best"],
        ["--select", "topk:k=0"],
        ["--unit", "3/2"],
        ["--temperatures", "hot"],
        ["--max-length", "100000"],
        ["--dtype", "int3"],
        ["--no-such-option"],
        ["--device", "banana"],
        ["--template-options", "[1]"],
        ["--select", "topk:k=5,k=6"],
        ["--select", "pps:tau=0.06,draws=2"],
        ["--select", "counts:n=5,temperature=0"],
        ["--unit-tokens", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2(
    kdstore_cli: Run, teacher_dir: Path, data_file: Path, tmp_path: Path, options: list[str]
) -> None:
    code, _, error = dump_of(kdstore_cli, teacher_dir, data_file, tmp_path / "out", *options)
    assert code == 2, error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "stats", "status", "verify"])
def test_no_store(kdstore_cli: Run, tmp_path: Path, command: str) -> None:
    assert_refused(kdstore_cli(command, tmp_path / "none"), 1, "no store here", "none")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("plan.parquet", ["verify"]),
        ("idorder.arrow", ["stats"]),
        ("tokenizer/table.arrow", ["inspect", "--sample", "0"]),
    ],
)
def test_a_store_that_lacks_a_file(
    dump: Dump, kdstore_cli: Run, name: str, command: list[str]
) -> None:
    store = dump()
    (store / name).unlink()
    code, _, error = kdstore_cli(command[0], store, *command[1:])
    assert code == 1
    assert name in error
    assert "Traceback" not in error


def test_unknown_signal(dump: Dump) -> None:
    with pytest.raises(UsageError, match="'audit'"):
        kdstore.open(dump(), signal="audit")


def test_future_header(dump: Dump, kdstore_cli: Run) -> None:
    header = dump() / "kdstore.json"
    header.write_text(header.read_text().replace('"format_version": "', '"format_version": "99.'))
    assert_refused(kdstore_cli("stats", header.parent), 1, "newer kdstore")


def test_unknown_sample(dump: Dump, kdstore_cli: Run) -> None:
    assert_refused(kdstore_cli("inspect", dump(), "--sample", "nobody"), 2, "nobody")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdstore_cli.main", "stats", str(tmp_path), "--debug"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.fixture
def full_disk(tmp_path: Path) -> Path:
    """A file system of 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk(kdstore_cli: Run, teacher_dir: Path, data_file: Path, full_disk: Path) -> None:
    """Full selections outgrow the disk after some units; those stay, and no partial file does."""
    out = full_disk / "store"
    options = ("--select", "full", "--unit-tokens", "200")
    result = dump_of(kdstore_cli, teacher_dir, data_file, out, *options)
    assert_refused(result, 1, "No space left", "resumes")
    store = kdstore.open(out)
    assert not store.is_complete
    assert len(list(store)) == len(store) > 0
    store.close()
    names = [path.name for path in out.rglob("*") if path.is_file()]
    assert not [name for name in names if "partial" in name]
    shards = {commit.shard.path for commit in store.commits}
    assert {f"data/{path.name}" for path in (out / "data").iterdir()} == shards
    subprocess.run(["mount", "-o", "remount,size=20m", str(full_disk)], check=True)
    assert dump_of(kdstore_cli, teacher_dir, data_file, out, *options)[0] == 0
    assert kdstore_cli("verify", "--quiet", out)[0] == 0
