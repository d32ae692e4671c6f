"""What the commands print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import kdstore

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def test_help_names_all_commands(kdstore_cli: Run) -> None:
    code, output, _ = kdstore_cli("--help")
    assert code == 0
    for command in ("dump", "inspect", "stats", "status", "train", "verify"):
        assert command in output
        assert kdstore_cli(command, "--help")[0] == 0


def test_stats_json_has_the_contract(dump: Dump, kdstore_cli: Run) -> None:
    store_path = dump()
    code, output, _ = kdstore_cli("stats", "--json", store_path)
    found = json.loads(output)
    store = kdstore.open(store_path)
    scored = sum(sample.num_scored for sample in store)
    shards = sum(path.stat().st_size for path in (store_path / "data").iterdir())
    files = sum(path.stat().st_size for path in store_path.rglob("*") if path.is_file())
    assert code == 0
    assert found["num_samples"] == 60
    assert found["num_tokens"] == sum(sample.num_tokens for sample in store)
    assert found["num_scored"] == scored
    assert found["bytes_total"] == shards
    assert found["bytes_store"] == files
    assert found["kept_mass"] == pytest.approx(1, abs=1e-6)
    entries = sum(sample.signal.num_entries for sample in store)  # type: ignore[union-attr]
    assert found["entries_per_position"] == pytest.approx(entries / scored, abs=0.05)
    sizes = found["bytes_per_position"]
    parts = ("signal", "scalars", "input_ids", "other")
    assert sizes["total"] == pytest.approx(shards / scored)
    assert sum(sizes[part] for part in parts) == pytest.approx(sizes["total"])
    columns = sizes["columns"]
    assert sum(columns.values()) < sizes["total"]
    assert sizes["input_ids"] == columns["input_ids"] > 0
    assert min(sizes[part] for part in parts) > 0


def test_stats_and_inspect_print_for_people(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    code, output, _ = kdstore_cli("stats", store)
    assert code == 0
    assert "pps:tau=0.06" in output
    code, output, _ = kdstore_cli("inspect", store)
    assert code == 0
    assert kdstore.open(store).config_digest in output
    code, output, _ = kdstore_cli("inspect", store, "--sample", "row-7", "--positions", "2")
    assert code == 0
    assert "row-7" in output
    assert "█" in output


def test_inspect_json_shows_tokens_and_entries(dump: Dump, kdstore_cli: Run) -> None:
    store = dump(select="topk:k=3")
    code, output, _ = kdstore_cli("inspect", store, "--sample", "0", "--json", "--positions", "4")
    found = json.loads(output)
    sample = kdstore.open(store)[0]
    assert code == 0
    assert found["sample_id"] == "row-0"
    assert [row["position"] for row in found["positions"]] == [1, 2, 3, 4]
    top = found["positions"][0]["top"]
    assert len(top) == 3
    assert top[0]["p"] >= top[1]["p"] >= top[2]["p"]
    assert found["positions"][0]["label_logprob"] == pytest.approx(
        float(sample.signal.scalars["label_logprob"][0])  # type: ignore[union-attr]
    )


def test_dump_summary_is_json_on_standard_output(
    kdstore_cli: Run, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    code, output, error = kdstore_cli(
        "dump", "--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "s", "--json"
    )
    found = json.loads(output)
    assert code == 0
    assert found["complete"]
    assert found["num_split"] == 0
    assert "tokens" in error


def test_quiet_says_nothing(
    kdstore_cli: Run, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    result = kdstore_cli(
        "dump", "--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "s", "--quiet"
    )
    assert result == (0, "", "")
