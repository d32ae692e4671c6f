"""What the commands print."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import kdstore
from kdstore.readers.fidelity import store_fidelity

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
    assert sizes["audit"] == 0
    parts = ("signal", "scalars", "input_ids", "other")
    assert sizes["total"] == pytest.approx(shards / scored)
    assert sum(sizes[part] for part in parts) == pytest.approx(sizes["total"])
    columns = sizes["columns"]
    assert sum(columns.values()) < sizes["total"]
    assert sizes["input_ids"] == columns["input_ids"] > 0
    assert min(sizes[part] for part in parts) > 0


def test_stats_count_the_audit_apart(dump: Dump, kdstore_cli: Run) -> None:
    sizes = {}
    for fraction in (0, 0.25):
        code, output, _ = kdstore_cli(
            "stats", "--json", dump(f"s{fraction}", audit_fraction=fraction)
        )
        assert code == 0
        sizes[fraction] = json.loads(output)
    without, found = sizes.values()
    parts = found["bytes_per_position"]
    columns = parts["columns"]
    audit = [size for name, size in columns.items() if name.startswith("signal/audit/")]
    assert len(audit) == 4  # runs, two planes, the hash
    assert parts["audit"] == pytest.approx(sum(audit))
    assert (without["num_audited"], without["bytes_per_position"]["audit"]) == (0, 0)
    assert found["num_audited"] == pytest.approx(0.25 * found["num_scored"], rel=0.1)
    for name in ("signal", "scalars"):
        assert parts[name] == pytest.approx(without["bytes_per_position"][name], rel=0.1)
    names = ("signal", "scalars", "audit", "input_ids", "other")
    assert sum(parts[name] for name in names) == pytest.approx(parts["total"])


SAMPLED = {
    "num_audited",
    "kept_mass",
    "gradient_bias",
    "gradient_bias_by_chance",
    "gradient_angle_degrees",
    "variance",
    "variance_error",
    "equivalent_rounds",
    "relative_variance",
    "relative_variance_error",
    "relative_variance_expected",
    "relative_equivalent_rounds",
}


@pytest.mark.parametrize(
    ("select", "keys"),
    [
        ("pps:tau=0.06", SAMPLED),
        ("counts:n=20", SAMPLED),
        ("topk:k=5", {"num_audited", "kept_mass", "kl_quantisation", "kl_truncation"}),
    ],
)
def test_fidelity_in_json_and_for_people(
    dump: Dump, kdstore_cli: Run, select: str, keys: set[str]
) -> None:
    store = dump(select=select, audit_fraction=0.2)
    code, output, _ = kdstore_cli("stats", "--fidelity", "--json", store)
    found = json.loads(output)["fidelity"]
    assert code == 0
    assert set(found) == keys
    assert found == store_fidelity(kdstore.open(store))
    code, output, _ = kdstore_cli("stats", "--fidelity", store)
    assert code == 0
    lines = [line for line in output.splitlines() if line.startswith("fidelity: ")]
    assert len(lines) == len(keys) + 4 * (select == "topk:k=5")  # mean, p99 and max of two
    assert lines[0].split() == ["fidelity:", "num", "audited", str(found["num_audited"])]
    assert "fidelity" not in json.loads(kdstore_cli("stats", "--json", store)[1])


def test_fidelity_needs_an_audit(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    code, output, error = kdstore_cli("stats", "--fidelity", store)
    assert (code, output) == (2, "")
    assert "--audit-fraction" in error
    assert str(store) in error


def test_inspect_shows_the_audit(dump: Dump, kdstore_cli: Run) -> None:
    store = dump(audit_fraction=0.25)
    code, output, _ = kdstore_cli("inspect", store)
    assert code == 0
    assert "identity.signals.audit.fraction" in output
    code, output, _ = kdstore_cli("inspect", store, "--signal", "audit", "--sample", "0", "--json")
    found = json.loads(output)
    audited = kdstore.open(store, signal="audit")[0]
    assert code == 0
    assert [row["position"] for row in found["positions"]] == audited.positions_S[:20].tolist()
    assert found["positions"][0]["entries"] == audited.signal.entries_S[0] > 200  # type: ignore[union-attr]
    code, _, error = kdstore_cli("inspect", dump("plain"), "--signal", "audit")
    assert code == 2
    assert "'audit'" in error


def test_stats_and_inspect_print_for_people(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    code, output, _ = kdstore_cli("stats", store)
    assert code == 0
    assert "pps:tau=0.02" in output
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
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["seconds"], rel=0.01)
    stages = [found[f"{stage}_seconds"] for stage in ("read", "score", "write", "wait")]
    assert all(0 <= seconds <= found["seconds"] for seconds in stages)
    assert stages[1] > 0
    line = error.splitlines()[-1]
    assert re.search(r"tokens/s, [\d.]+ bytes/token, read \d+%, score \d+%, write \d+%, wait", line)


def test_quiet_says_nothing(
    kdstore_cli: Run, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    result = kdstore_cli(
        "dump", "--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "s", "--quiet"
    )
    assert result == (0, "", "")


def test_the_default_selection_is_one() -> None:
    """The command has it as text, since importing selections would load torch."""
    from kdstore_cli.dump import dump as command

    from kdstore.select import DEFAULT_SELECTION

    (option,) = [one for one in command.params if one.name == "selection"]
    assert option.default == DEFAULT_SELECTION
