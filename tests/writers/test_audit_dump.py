"""Dumps with an audit: where it is, what it holds, and that nothing depends on how it was run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kdstore
from kdstore.audit import audit_runs
from kdstore.commits import load_commits
from kdstore.layout import commit_path
from kdstore.select import parse_selection
from kdstore.writers import dump as dump_module
from kdstore.writers.dump import default_unit_tokens
from tests.writers.test_dump import assert_same, assert_same_store, dense_logprobs

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def assert_same_audit(one: Path, other: Path) -> None:
    assert_same_store(one, other)
    first, second = (kdstore.open(path, signal="audit") for path in (one, other))
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)


def test_the_audit_is_the_teachers_distribution_at_the_chosen_positions(
    dump: Dump, teacher_dir: Path
) -> None:
    path = dump(audit_fraction=0.25, seed=7)
    store, audit = kdstore.open(path), kdstore.open(path, signal="audit")
    for sample, audited in zip(store, audit, strict=True):
        assert audited.sample_id == sample.sample_id
        assert audited.runs == audit_runs(sample, fraction=0.25, seed=7)
    for index in (0, 13):
        audited = audit[index]
        assert audited.signal is not None
        assert audited.signal.scalars == {}
        want = dense_logprobs(teacher_dir, audited).exp().numpy()
        got = audited.signal.to_dense(want.shape[1])
        np.testing.assert_allclose(got, want, atol=2e-3, rtol=2e-3)
        np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)


def test_both_signals_come_from_the_same_logits(dump: Dump) -> None:
    """Both are ``full`` here: where they overlap they hold the same bits."""
    path = dump(select="full", audit_fraction=0.25)
    for sample, audited in zip(kdstore.open(path), kdstore.open(path, signal="audit"), strict=True):
        rows = np.isin(sample.positions_S, audited.positions_S)
        assert sample.signal is not None
        assert audited.signal is not None
        np.testing.assert_array_equal(sample.signal[rows].logprobs_N, audited.signal.logprobs_N)


def test_the_audit_changes_nothing_else(dump: Dump) -> None:
    without, with_audit = dump("without"), dump("with", audit_fraction=0.25)
    assert_same_store(without, with_audit)


def test_units_can_be_lost_and_made_again(dump: Dump) -> None:
    whole, broken = (dump(name, audit_fraction=0.1) for name in ("whole", "broken"))
    for manifest in broken.glob("manifest-*"):
        manifest.unlink()
    for unit in (1, 2):
        (broken / commit_path(unit)).unlink()
    dump("broken", audit_fraction=0.1)
    assert_same_audit(whole, broken)


def test_workers_share_a_dump(dump: Dump) -> None:
    whole = dump("whole", audit_fraction=0.1)
    for worker in ("1/2", "0/2"):
        shared = dump("shared", audit_fraction=0.1, unit=worker)
    assert_same_audit(whole, shared)


def test_batch_size_changes_no_audited_position(dump: Dump) -> None:
    one, other = dump("one", audit_fraction=0.1), dump("other", audit_fraction=0.1, batch_tokens=64)
    pairs = zip(kdstore.open(one, signal="audit"), kdstore.open(other, signal="audit"), strict=True)
    for a, b in pairs:
        assert a.runs == b.runs
        assert a.signal is not None
        assert b.signal is not None
        np.testing.assert_allclose(a.signal.logprobs_N, b.signal.logprobs_N, atol=0.02)


def test_samples_without_audited_positions_are_kept(dump: Dump) -> None:
    path = dump(audit_fraction=0.01)
    counts = [sample.num_scored for sample in kdstore.open(path, signal="audit")]
    assert len(counts) == 60
    assert 0 in counts
    assert sum(counts) > 0


def test_commits_count_what_is_audited(dump: Dump) -> None:
    store = kdstore.open(dump(audit_fraction=0.2), signal="audit")
    commits = load_commits(store.folder, store.header)
    counted = sum(commit.statistics["audited"] for commit in commits)
    assert counted == sum(sample.num_scored for sample in store) > 100


@pytest.mark.parametrize(("first", "second"), [(0.1, 0.2), (0.0, 0.1), (0.1, 0.0)])
def test_another_fraction_is_refused_by_name(
    dump: Dump,
    kdstore_cli: Run,
    teacher_dir: Path,
    data_file: Path,
    first: float,
    second: float,
) -> None:
    out = dump(audit_fraction=first)
    options = ("--teacher", teacher_dir, "--data", data_file, "--out", out, "--quiet")
    code, _, error = kdstore_cli("dump", *options, "--audit-fraction", second)
    assert code == 1
    assert "signals.audit" in error
    assert "Traceback" not in error


def test_a_store_without_an_audit_has_no_second_signal(dump: Dump) -> None:
    header = json.loads((dump(audit_fraction=0) / "kdstore.json").read_text())
    assert list(header["identity"]["signals"]) == ["main"]


def test_a_sample_with_too_much_to_audit_is_refused_at_planning(
    dump: Dump,
    kdstore_cli: Run,
    teacher_dir: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dump_module, "MAX_UNIT_ENTRIES", 384 * 20)
    out = tmp_path / "store"
    options = ("--teacher", teacher_dir, "--data", data_file, "--out", out, "--quiet")
    code, _, error = kdstore_cli("dump", *options, "--audit-fraction", "0.5")
    assert code == 2
    for words in ("at most 20 of", "sample 'row-", "--audit-fraction"):
        assert words in error
    assert not (out / "kdstore.json").exists()
    assert len(kdstore.open(dump(audit_fraction=0.05))) == 60


@pytest.mark.parametrize("fraction", ["-0.1", "1.5", "much"])
def test_fractions_out_of_range(
    kdstore_cli: Run, teacher_dir: Path, data_file: Path, tmp_path: Path, fraction: str
) -> None:
    options = ("--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "s")
    code, _, error = kdstore_cli("dump", *options, "--audit-fraction", fraction)
    assert code == 2
    assert "--audit-fraction" in error


def test_units_hold_fewer_tokens_where_more_is_audited() -> None:
    pps = parse_selection("pps:tau=0.0625")  # 16 entries a position
    sizes = [default_unit_tokens(pps, 262_144, audit_fraction=f) for f in (0.0, 0.001, 1.0)]
    assert sizes == [1 << 22, int((1 << 27) / (16 + 262.144)), (1 << 27) // (16 + 262_144)]
