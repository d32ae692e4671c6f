"""Dumps end to end: what is stored, resume, and that nothing depends on how it was run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import kdstore
from kdstore.hashing import RowKeys
from kdstore.layout import commit_path
from kdstore.sample import Sample
from kdstore.select import parse_selection, select
from kdstore.writers.dump import DumpSource, default_unit_tokens
from tests.conftest import write_jsonl

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def assert_same(one: Sample, other: Sample) -> None:
    assert (one.sample_id, one.runs, one.spans) == (other.sample_id, other.runs, other.spans)
    np.testing.assert_array_equal(one.input_ids_T, other.input_ids_T)
    assert one.signal is not None
    assert other.signal is not None
    for name in ("indptr", "ids_N", "logprobs_N", "rest_S"):
        np.testing.assert_array_equal(getattr(one.signal, name), getattr(other.signal, name))
    for name, values in one.signal.scalars.items():
        np.testing.assert_array_equal(values, other.signal.scalars[name])


def assert_same_store(one: Path, other: Path) -> None:
    first, second = kdstore.open(one), kdstore.open(other)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)


def dense_logprobs(teacher_dir: Path, sample: Sample) -> torch.Tensor:
    """float64 log-probabilities of each scored position, one sample at a time, no kdstore code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    num_ids = len(AutoTokenizer.from_pretrained(teacher_dir))
    with torch.no_grad():
        logits = model(torch.from_numpy(sample.input_ids_T)[None].long()).logits[0].double()
    return logits[sample.positions_S - 1, :num_ids].log_softmax(-1)


def test_stored_signals_are_the_teachers(dump: Dump, teacher_dir: Path) -> None:
    store = kdstore.open(dump(select="full"))
    for index in (0, 7, -1):
        sample = store[index]
        assert sample.signal is not None
        want = dense_logprobs(teacher_dir, sample)
        got = torch.from_numpy(sample.signal.to_dense(want.shape[1]))
        torch.testing.assert_close(got, want.exp(), atol=2e-3, rtol=2e-3)
        labels = torch.from_numpy(sample.input_ids_T[sample.positions_S]).long()
        label_logp = want.gather(1, labels[:, None])[:, 0]
        stored = torch.from_numpy(sample.signal.scalars["label_logprob"]).double()
        torch.testing.assert_close(stored, label_logp, atol=1 / 64 + 1e-4, rtol=0)


@pytest.mark.parametrize("selection", ["topk:k=5", "topp:p=0.9", "counts:n=20", "pps:tau=0.06"])
def test_every_selection_has_every_sample_once(dump: Dump, selection: str) -> None:
    store = kdstore.open(dump(select=selection))
    assert [sample.sample_id for sample in store] == [f"row-{i}" for i in range(60)]
    for sample in store:
        assert sample.runs == ((1, sample.num_tokens),)
        assert sample.signal is not None
        total = sample.signal.kept_mass_S + np.exp(sample.signal.rest_S.astype(np.float64))
        np.testing.assert_allclose(total, 1, atol=1e-6)


def test_rerun_is_a_no_op_and_says_the_same(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    dump()
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before
    code, output, _ = kdstore_cli("verify", "--quiet", "--json", store)
    assert (code, json.loads(output)["num_samples"]) == (0, 60)


def test_units_can_be_lost_and_made_again(dump: Dump) -> None:
    whole, broken = dump("whole"), dump("broken")
    for manifest in broken.glob("manifest-*"):
        manifest.unlink()
    for unit in (0, 2, 3):
        (broken / commit_path(unit)).unlink()
    assert len(kdstore.open(broken)) < 60
    dump("broken")
    assert_same_store(whole, broken)


def test_workers_share_a_dump(dump: Dump) -> None:
    whole = dump("whole")
    for worker in ("1/3", "0/3"):
        dump("shared", unit=worker)
    assert not kdstore.open(whole.parent / "shared").is_complete
    dump("shared", unit="2/3")
    assert kdstore.open(whole.parent / "shared").is_complete
    assert_same_store(whole, whole.parent / "shared")


def test_plan_only_writes_no_signal(
    dump: Dump, kdstore_cli: Run, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "planned"
    code, output, _ = kdstore_cli(
        "dump", "--teacher", teacher_dir, "--data", data_file, "--out", out, "--plan-only", "--json"
    )
    assert (code, json.loads(output)["samples"]) == (0, 0)
    assert not (out / "data").exists()
    assert {"kdstore.json", "plan.parquet", "idorder.arrow"} <= {p.name for p in out.iterdir()}


def test_headers_of_equal_dumps_are_equal_bytes(dump: Dump) -> None:
    one, other = dump("one"), dump("other")
    for name in ("kdstore.json", "idorder.arrow", "plan.parquet", "tokenizer/table.arrow"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_batch_size_changes_no_draw(dump: Dump) -> None:
    """Another batch shape moves the last bits of logits, which at most nudges a few draws."""
    one, other = kdstore.open(dump("one")), kdstore.open(dump("other", batch_tokens=64))
    same = sum(
        np.array_equal(a.signal.ids_N, b.signal.ids_N)  # type: ignore[union-attr]
        for a, b in zip(one, other, strict=True)
    )
    assert same >= 58


def test_labels_are_aligned() -> None:
    """A teacher that always knows the next token is sure of the label at every scored position."""
    sample = Sample("a", np.array([5, 9, 2, 7, 7, 1], dtype=np.int32), runs=((2, 4), (5, 6)))
    ids = torch.from_numpy(sample.input_ids_T).long()
    logits = torch.zeros(6, 12)
    logits[torch.arange(5), ids[1:]] = 30.0  # row t - 1 answers position t
    rows = torch.from_numpy(sample.positions_S)
    keys = RowKeys.of_samples([("a", sample.positions_S)], seed=0)
    for shift, knows in ((-1, True), (0, False)):
        signal = select(
            logits[(rows + shift).clamp(max=5)],
            ids[rows],
            selection=parse_selection("topk:k=1"),
            keys=keys,
        )
        assert (signal.scalars["label_logprob"] > -1e-3).all() == knows


def test_samples_without_scored_positions_are_kept(dump: Dump, tmp_path: Path) -> None:
    rows = [
        {"id": "silent", "input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
        {"id": "short", "input_ids": [9]},
        {"id": "spoken", "input_ids": [5, 6, 7]},
    ]
    store = kdstore.open(dump(data=write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert [(s.sample_id, s.num_scored) for s in store] == [
        ("silent", 0),
        ("short", 0),
        ("spoken", 2),
    ]
    only = dump("only", data=write_jsonl(tmp_path / "silent.jsonl", rows[:2]))
    assert [len(s.signal) for s in kdstore.open(only)] == [0, 0]  # type: ignore[arg-type]


def test_lse_at_other_temperatures_is_stored(dump: Dump) -> None:
    signal = kdstore.open(dump(select="full", temperatures="2,1.5"))[0].signal
    assert signal is not None
    p = signal.to_dense(384)
    np.testing.assert_allclose(signal.scalars["lse_T2.0"], np.log(np.sqrt(p).sum(1)), atol=2e-3)
    assert "lse_T1.5" in signal.scalars


def test_long_samples_are_split_and_counted(dump: Dump, kdstore_cli: Run) -> None:
    store = kdstore.open(dump(max_length=20))
    counted = store.header.plan["input"]
    assert counted["num_split"] > 0
    assert len(store) == counted["num_samples"] > 60
    assert store[0].sample_id == "row-0#0"
    assert max(sample.num_tokens for sample in store) == 20


def test_texts_and_metadata_are_kept_on_request(
    kdstore_cli: Run, teacher_dir: Path, tmp_path: Path
) -> None:
    rows = [{"id": "a", "text": "in the beginning", "metadata": {"book": 1}}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    for options, text in (([], None), (["--keep-text"], "in the beginning")):
        out = tmp_path / f"store{len(options)}"
        code, _, error = kdstore_cli(
            "dump", "--teacher", teacher_dir, "--data", data, "--out", out, "--quiet", *options
        )
        assert code == 0, error
        sample = kdstore.open(out)[0]
        assert (sample.text, sample.metadata) == (text, {"book": 1})


def test_one_temperature_named_twice_is_recorded_once(dump: Dump) -> None:
    store = kdstore.open(dump(temperatures="2,2.0"))
    assert store.header.identity["signals"]["main"]["scalars"].count("lse_T2.0") == 1
    assert store[0].signal is not None


def test_default_units_hold_fewer_tokens_of_large_selections() -> None:
    sizes = [default_unit_tokens(parse_selection(s), 32_000) for s in ("pps:tau=0.06", "full")]
    assert sizes == [1 << 22, (1 << 27) // 32_000]


def test_only_rows_of_pending_units_are_tokenised(
    dump: Dump, teacher_dir: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(unit="1/2")
    built: list[int] = []
    build = DumpSource.build
    monkeypatch.setattr(
        DumpSource,
        "build",
        lambda self, row, content: built.append(row) or build(self, row, content),
    )
    dump()
    assert 0 < len(built) < 60
    assert len(set(built)) == len(built)
