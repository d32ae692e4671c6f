"""Overlays: what is added to a finished store, resume, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import kdstore
from kdstore.errors import SignalError, StoreMismatchError, UsageError
from kdstore.layout import commit_path
from kdstore.readers.store import Store
from kdstore.sample import Sample
from kdstore.writers.overlay import OverlayWriter, add_scalar
from tests.conftest import write_jsonl
from tests.writers.test_dump import assert_same, assert_same_store, dense_logprobs

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by relative path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def square_error(sample: Sample, want: NDArray[np.float64], draws: list[Sample]) -> float:
    """Sum of squares of what the mean of some draws of a sample's signal misses the teacher by."""
    V = want.shape[1]
    mean = np.mean([draw.signal.to_dense(V) for draw in draws], axis=0)  # type: ignore[union-attr]
    assert mean.shape[0] == sample.num_scored
    return float(((mean - want) ** 2).sum())


def test_an_overlay_changes_no_file_of_its_store(dump: Dump) -> None:
    store = dump()
    before = digests_of(store)
    dump(overlay="draw1", draw=1)
    dump(overlay="lse", scalars="lse,lse_T1.5")
    after = digests_of(store)
    assert {path: after[path] for path in before} == before
    added = {path.split("/")[1] for path in after if path not in before}
    assert added == {"draw1", "lse"}
    assert kdstore.open(store).config_digest == kdstore.open(store, overlays=()).config_digest


@pytest.mark.parametrize("selection", ["pps:tau=0.06", "counts:n=20"])
def test_the_mean_of_two_draws_is_nearer_to_the_teacher(
    dump: Dump, teacher_dir: Path, selection: str
) -> None:
    """Independent and unbiased: the mean of two draws has half the square error of one."""
    path = dump(select=selection)
    dump(select=selection, overlay="other", draw=1)
    store = kdstore.open(path)
    assert store.num_draws == 2
    errors = np.zeros(3)
    for index in range(0, 60, 3):
        want = dense_logprobs(teacher_dir, store[index]).exp().numpy()
        one, other = store[index, 0], store[index, 1]
        errors += [square_error(one, want, d) for d in ([one], [other], [one, other])]
    assert errors[1] / errors[0] == pytest.approx(1, abs=0.1)
    assert errors[2] / errors[:2].mean() == pytest.approx(0.5, abs=0.05)


def test_a_draw_has_its_own_entries_and_the_stores_scalars(dump: Dump) -> None:
    store = dump()
    dump(overlay="draw1", draw=1)
    opened = kdstore.open(store)
    one, other = opened[7], opened[7, 1]
    assert one.signal is not None
    assert other.signal is not None
    assert not np.array_equal(one.signal.logprobs_N, other.signal.logprobs_N)
    np.testing.assert_allclose(other.signal.kept_mass_S, 1, atol=1e-6)
    assert one.signal.scalars.keys() == other.signal.scalars.keys()
    for name, values in one.signal.scalars.items():
        np.testing.assert_array_equal(values, other.signal.scalars[name])
    assert_same(one, opened[7, 0])
    assert (one.runs, one.spans) == (other.runs, other.spans)


def test_a_draw_does_not_depend_on_how_it_came_to_be(dump: Dump) -> None:
    """Draw 1 of one store is draw 1 of another, whatever the overlay is called and who wrote it."""
    whole, shared = dump("whole"), dump("shared")
    dump("whole", overlay="a", draw=1)
    for worker in ("1/2", "0/2"):
        dump("shared", overlay="b", draw=1, unit=worker, batch_tokens=16_384)
    one, other = kdstore.open(whole), kdstore.open(shared)
    for index in range(60):
        assert_same(one[index, 1], other[index, 1])


def test_scalars_of_an_overlay_are_those_of_a_dump(dump: Dump) -> None:
    """float32, bit for bit; the name of a temperature is canonical."""
    plain, rich = dump("plain"), dump("rich", temperatures="1.5,2")
    dump("plain", overlay="more", scalars="lse_T1.50, lse_T2.0,lse")
    for one, other in zip(kdstore.open(plain), kdstore.open(rich), strict=True):
        assert one.signal is not None
        assert other.signal is not None
        assert set(one.signal.scalars) - set(other.signal.scalars) == {"lse"}
        for name in ("label_logprob", "lse_T1.5", "lse_T2.0"):
            np.testing.assert_array_equal(one.signal.scalars[name], other.signal.scalars[name])
        np.testing.assert_array_equal(one.signal.ids_N, other.signal.ids_N)


def test_lost_units_of_an_overlay_are_made_again(dump: Dump, kdstore_cli: Run) -> None:
    whole, broken = dump("whole"), dump("broken")
    for name in ("whole", "broken"):
        dump(name, overlay="draw1", draw=1)
    overlay = broken / "overlays" / "draw1"
    for path in overlay.glob("manifest-*"):
        path.unlink()
    for unit in (0, 2):
        (overlay / commit_path(unit)).unlink()
    opened = kdstore.open(broken)
    assert opened.num_draws == 1
    assert_same(opened[0], kdstore.open(whole)[0])
    with pytest.raises(UsageError, match="draw 1 is incomplete"):
        opened[0, 1]
    _, output, _ = kdstore_cli("status", broken)
    units = opened.header.num_units
    assert ["overlay", "draw1", str(units - 2), "of", str(units), "units"] in [
        line.split() for line in output.splitlines()
    ]
    dump("broken", overlay="draw1", draw=1)
    assert_same_draws(whole, broken)


def assert_same_draws(one: Path, other: Path) -> None:
    assert_same_store(one, other)
    first, second = kdstore.open(one), kdstore.open(other)
    for index in range(len(first)):
        assert_same(first[index, 1], second[index, 1])


def test_a_rerun_writes_nothing(dump: Dump) -> None:
    store = dump()
    dump(overlay="draw1", draw=1)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    dump(overlay="draw1", draw=1)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_row_groups_are_those_of_the_store(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdstore.writers.shard.ROW_GROUP_BYTES", 2000)
    path = dump()
    monkeypatch.undo()
    dump(overlay="draw1", draw=1)
    store = kdstore.open(path)
    reader = store.overlays.reader("draw1", store.decoder.codec)
    for unit in range(store.header.num_units):
        bounds = store.shard(unit).first_rows
        assert len(bounds) > 2
        np.testing.assert_array_equal(reader.shard(unit).first_rows, bounds)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"draw": 2}, "draw"),
        ({"scalars": "lse"}, "codec"),
        ({"draw": 1, "seed": 3}, "seed"),
        ({"draw": 1, "select": "pps:tau=0.1"}, "signals.main.selection"),
    ],
)
def test_other_settings_are_refused(
    dump: Dump,
    kdstore_cli: Run,
    teacher_dir: Path,
    data_file: Path,
    options: dict[str, object],
    field: str,
) -> None:
    store = dump()
    dump(overlay="mine", draw=1)
    before = digests_of(store)
    more = [part for name, value in options.items() for part in (f"--{name}", value)]
    arguments = ["--teacher", teacher_dir, "--data", data_file, "--out", store]
    code, _, error = kdstore_cli(
        "dump", *arguments, "--unit-tokens", 500, "--overlay", "mine", "--quiet", *more
    )
    assert code == 1
    assert f"made with another configuration: {field} differs" in error
    assert digests_of(store) == before


def test_another_source_is_refused(
    dump: Dump, kdstore_cli: Run, teacher_dir: Path, tmp_path: Path
) -> None:
    store = dump()
    data = write_jsonl(tmp_path / "other.jsonl", [{"id": "row-0", "text": "in the beginning"}])
    code, _, error = kdstore_cli(
        *("dump", "--teacher", teacher_dir, "--data", data, "--out", store, "--quiet"),
        *("--unit-tokens", 500, "--overlay", "draw1", "--draw", 1),
    )
    assert (code, "source" in error) == (1, True), error
    assert not (store / "overlays").exists()


def test_another_teacher_is_refused(
    dump: Dump, kdstore_cli: Run, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = dump()
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "other" / teacher_dir.name)
    AutoTokenizer.from_pretrained(teacher_dir).save_pretrained(
        tmp_path / "other" / teacher_dir.name
    )
    code, _, error = kdstore_cli(
        *("dump", "--teacher", tmp_path / "other" / teacher_dir.name, "--data", data_file),
        *("--out", store, "--quiet", "--unit-tokens", 500, "--overlay", "draw1", "--draw", 1),
    )
    assert (code, "teacher.revision differs" in error) == (1, True), error
    assert not (store / "overlays").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--overlay", "../x", "--draw", 1], "not fit for a folder"),
        (["--overlay", ".x", "--draw", 1], "not fit for a folder"),
        (["--overlay", "a/b", "--draw", 1], "not fit for a folder"),
        (["--overlay", "x\n", "--draw", 1], "not fit for a folder"),
        (["--overlay", "", "--draw", 1], "not fit for a folder"),
        (["--overlay", "x"], "adds a draw, or scalars"),
        (["--overlay", "x", "--draw", 1, "--scalars", "lse"], "adds a draw, or scalars"),
        (["--draw", 1], "adds a draw, or scalars"),
        (["--scalars", "lse"], "adds a draw, or scalars"),
        (["--overlay", "x", "--scalars", ","], "adds one draw, or scalars"),
        (["--overlay", "x", "--scalars", "mood"], "unknown scalar 'mood'"),
        (["--overlay", "x", "--scalars", "entropy"], "has already"),
    ],
)
def test_wrong_usage(
    dump: Dump,
    kdstore_cli: Run,
    teacher_dir: Path,
    data_file: Path,
    options: list[object],
    message: str,
) -> None:
    store = dump()
    before = digests_of(store.parent)
    code, _, error = kdstore_cli(
        *("dump", "--teacher", teacher_dir, "--data", data_file, "--out", store, "--quiet"),
        *("--unit-tokens", 500, *options),
    )
    assert (code, message in error) == (2, True), error
    assert digests_of(store.parent) == before


def test_what_the_store_has_is_not_added_again(dump: Dump) -> None:
    store = dump()
    dump(overlay="draw1", draw=1)
    dump(overlay="lse", scalars="lse")
    for options, taken in (({"draw": 1}, "draw 1"), ({"scalars": ["x", "lse"]}, "'lse'")):
        with pytest.raises(UsageError, match=taken):
            OverlayWriter.open(kdstore.open(store), "again", **options)  # type: ignore[arg-type]
    assert not (store / "overlays" / "again").exists()


def test_a_selection_without_chance_has_no_other_draw(dump: Dump) -> None:
    store = kdstore.open(dump(select="topk:k=5"))
    with pytest.raises(UsageError, match="no other draws"):
        OverlayWriter.open(store, "draw1", draw=1)


def test_only_finished_stores_have_overlays(
    dump: Dump, kdstore_cli: Run, teacher_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="only a finished store"):
        OverlayWriter.open(kdstore.open(dump(unit="0/2")), "draw1", draw=1)
    arguments = ["--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "nothing"]
    code, _, error = kdstore_cli("dump", *arguments, "--overlay", "draw1", "--draw", 1)
    assert (code, "there is no store here" in error) == (1, True), error
    assert not (tmp_path / "nothing").exists()


def behaviour(sample: Sample) -> NDArray[np.float32]:
    """Some exact float32 of each scored position, an infinity and a denormal among them."""
    values = np.random.default_rng(sample.num_tokens).normal(size=sample.num_scored)
    values[:2] = -np.inf, 1e-40
    return values.astype(np.float32)


def test_a_callers_scalar_is_kept_bit_for_bit(dump: Dump, kdstore_cli: Run) -> None:
    store = dump()
    before = digests_of(store)
    add_scalar(store, "behaviour_logprob", behaviour)
    add_scalar(store, "behaviour_logprob", lambda sample: pytest.fail("it is all there"))
    for sample in kdstore.open(store):
        assert sample.signal is not None
        found = sample.signal.scalars["behaviour_logprob"]
        np.testing.assert_array_equal(found.view(np.int32), behaviour(sample).view(np.int32))
    assert kdstore_cli("verify", "--quiet", store)[0] == 0
    after = digests_of(store)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize(
    "values",
    [
        lambda sample: np.zeros(sample.num_scored),
        lambda sample: np.zeros(sample.num_scored + 1, np.float32),
        lambda sample: np.full(sample.num_scored, np.nan, np.float32),
    ],
)
def test_values_that_cannot_be_kept_are_refused(
    dump: Dump, values: Callable[[Sample], NDArray[np.float32]]
) -> None:
    store = dump()
    with pytest.raises(SignalError, match="sample 'row-0'"):
        add_scalar(store, "mine", values)
    assert "mine" not in kdstore.open(store)[0].signal.scalars  # type: ignore[union-attr]


def test_a_callers_scalar_is_not_resumed_by_a_teacher(dump: Dump) -> None:
    store = dump()
    with pytest.raises(SignalError):
        add_scalar(store, "lse", lambda sample: np.zeros(0))
    with pytest.raises(StoreMismatchError, match="origin differs"):
        OverlayWriter.open(kdstore.open(store), "lse", scalars=["lse"])


def test_samples_without_scored_positions_have_empty_rows(dump: Dump, tmp_path: Path) -> None:
    rows = [
        {"id": "silent", "input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
        {"id": "spoken", "input_ids": [5, 6, 7]},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    store = dump(data=data)
    dump(data=data, overlay="draw1", draw=1)
    dump(data=data, overlay="lse", scalars="lse")
    opened = kdstore.open(store)
    signals = [opened[index, 1].signal for index in range(2)]
    assert [len(s.scalars["lse"]) for s in signals] == [0, 2]  # type: ignore[union-attr]
    assert [len(s) for s in signals] == [0, 2]  # type: ignore[arg-type]


def test_rows_of_other_scored_positions_are_refused_when_written(dump: Dump) -> None:
    store = Store(kdstore.open(dump()).folder)
    writer = OverlayWriter.open(store, "draw1", draw=1)
    samples = [store[index] for index in range(store.commits[0].shard.rows)]
    with pytest.raises(kdstore.KDStoreError, match="row 1") as caught:
        writer.row_groups(0, [samples[0], samples[2]])
    assert store.commits[0].shard.path in str(caught.value)


def test_the_overlays_header_says_what_it_is(dump: Dump) -> None:
    store = dump()
    dump(overlay="draw1", draw=1)
    dump(overlay="lse", scalars="lse")
    found = [json.loads(p.read_text()) for p in sorted((store / "overlays").glob("*/*.json"))]
    opened = kdstore.open(store)
    shared = {
        "store": opened.config_digest,
        "signal": "main",
        "origin": "teacher",
        "columns": ["sample_id", "num_scored"],
        "seed": 0,
    }
    codec = opened.header.identity["signals"]["main"]["codec"]
    assert [header["identity"] for header in found] == [
        {**shared, "codec": codec, "draw": 1, "scalars": []},
        {**shared, "codec": "scalars/1", "draw": 0, "scalars": ["lse"]},
    ]
    assert {header["plan"]["units"] for header in found} == {opened.header.num_units}
