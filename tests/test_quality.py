"""The maths of benchmarks/quality.py, and a run of it that takes seconds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.quality import Bench, Setting, main, read_runs, report
from benchmarks.quality_data import TEACHER, TEXTS, cut_tokenizer
from benchmarks.quality_gap import (
    ARMS,
    Arm,
    Result,
    Run,
    best_topk,
    bytes_at,
    choose_arms,
    curve,
    gap_closed,
    judge,
    missing,
    results_of,
    smallest,
    spread,
)
from benchmarks.quality_students import HeldOut, Lesson, StudentConfig, batches, rate_at
from benchmarks.scored import Text
from kdstore.train.losses import LOSSES

BY_NAME = {arm.name: arm for arm in ARMS}


def result(name: str, signal: float, *losses: float) -> Result:
    return Result(BY_NAME[name], signal, signal + 5, 1.0, losses)


def test_a_gap_is_closed_seed_by_seed() -> None:
    judged = judge(
        [
            result("ce", 0, 5.0, 4.0),
            result("full", 8000, 4.0, 3.5),
            result("pps06", 9, 4.1, 3.5),
        ]
    )
    assert judged[2].gap_closed == pytest.approx((0.9, 1.0))
    assert judged[2].above_full == pytest.approx((0.1, 0.0))
    assert judged[2].share == pytest.approx(0.95)
    assert spread(judged[2].gap_closed) == pytest.approx(np.sqrt(0.005))
    assert spread((0.9,)) is None


def test_bytes_at_a_share_lie_between_two_points() -> None:
    points = [(5.0, 0.5), (10.0, 0.9), (20.0, 1.0)]
    assert bytes_at(points, 0.95) == pytest.approx(10 * np.sqrt(2))
    assert bytes_at(points, 0.4) is None
    assert bytes_at(points, 1.01) is None


def test_families_leave_out_mixed_losses_draws_and_epochs() -> None:
    judged = judge(
        [
            *(result("ce", 0, 2.0), result("full", 8000, 1.0)),
            *(result("ce_3x", 0, 2.0), result("full_3x", 8000, 1.0)),
            *(result("pps06", 9, 1.2), result("pps027", 15, 1.04), result("pps018", 20, 1.01)),
            *(result("pps06_draws3", 27, 1.0), result("pps018_3x", 2, 1.0)),
            *(result("topk50", 55, 1.3), result("topk50_ce", 55, 1.25)),
        ]
    )
    assert np.array(curve(judged, "pps")) == pytest.approx(
        np.array([(9, 0.8), (15, 0.96), (20, 0.99)])
    )
    found, best = smallest(judged, "pps", share=0.95), best_topk(judged)
    assert found is not None
    assert found.result.arm.name == "pps027"
    assert smallest(judged, "topk", share=0.95) is None
    assert best is not None
    assert best.result.arm.name == "topk50_ce"


def test_arms_bring_their_bounds() -> None:
    assert [arm.name for arm in choose_arms(["pps06"])] == ["ce", "full", "pps06"]
    assert [arm.name for arm in choose_arms(["pps06_3x"])] == ["ce_3x", "full_3x", "pps06_3x"]
    with pytest.raises(ValueError, match="nothing"):
        choose_arms(["nothing"])


def test_what_is_missing_comes_seed_after_seed() -> None:
    arms = choose_arms(["pps06"])
    runs = [Run("full", 0, 0, 0, 0, 4.0), Run("pps06", 1, 0, 0, 0, 4.0), Run("ce", 9, 0, 0, 0, 4.0)]
    left = [(arm.name, seed) for arm, seed in missing(arms, runs, seeds=2)]
    assert left == [("ce", 0), ("pps06", 0), ("ce", 1), ("full", 1)]


def test_finished_runs_are_only_judged(tmp_path: Path) -> None:
    """Nothing is read of the folder of data, which is empty."""
    about = Setting().about()
    losses = {"ce": (5.0, 4.0), "full": (4.0, 3.5), "pps06": (4.1, 3.5)}
    runs = [Run(name, s, 9.0, 14.0, 8.0, losses[name][s]) for s in (0, 1) for name in losses]
    lines = [json.dumps({"figure": "quality.run", **about, "run": asdict(run)}) for run in runs]
    (tmp_path / "log").write_text("\n".join(lines))
    options = ["--data", tmp_path, "--seeds", 2, "--arms", "pps06", "--done", tmp_path / "log"]
    done = CliRunner().invoke(main, [str(option) for option in options])
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    found = {line["figure"]: line for line in printed}
    assert found["quality.pps06.gap_closed"]["value"] == pytest.approx(0.95)
    assert found["quality.pps06.gap_closed"]["runs"] == pytest.approx([0.9, 1.0])
    assert found["quality.pps06.gap_closed_sd"]["value"] == pytest.approx(np.sqrt(0.005))
    assert "quality.run" not in found


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 20, warmup=0.1) for step in range(20)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 18 / 19])
    assert rates[-1] == pytest.approx(1 / 19)
    assert gap_closed([1.0], ce=[3.0], full=[2.0]) == (2.0,)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, data_file: Path) -> Bench:
    data = tmp_path_factory.mktemp("quality")
    (data / TEACHER).symlink_to(teacher_dir)
    (data / TEXTS).symlink_to(data_file)
    student = StudentConfig(vocab_size=280, width=16, layers=1, heads=2)
    setting = Setting(student, window=16, held_out=60, first=90, positions=300)
    (data / "stores").mkdir()
    return Bench.of_data(data, setting, data / "stores")


def test_the_cut_tokenizer_has_the_first_ids(teacher_dir: Path) -> None:
    text = "in the beginning was a word"
    cut, whole = cut_tokenizer(teacher_dir, 280), cut_tokenizer(teacher_dir, 1 << 20)
    ids, whole_ids = cut(text)["input_ids"], whole(text)["input_ids"]
    assert max(ids) < 280 <= max(whole_ids)
    assert len(ids) > len(whole_ids)
    assert cut.decode(ids) == whole.decode(whole_ids) == text


def test_labels_are_drawn_and_batches_carry_them(bench: Bench) -> None:
    labels_WS = bench.stores.labels(seed=0)
    assert labels_WS.shape == (20, 15)
    assert (labels_WS != bench.stores.labels(seed=1)).any()
    store = bench.stores.store("pps:tau=0.06", seed=0)
    lesson = Lesson(store, labels_WS, {"ce": 1.0})
    first, other = (next(batches(lesson, 4, seed=seed)) for seed in (0, 1))
    assert first.sample_ids != other.sample_ids
    ids = [window.sample_id for window in bench.stores.windows]
    expected = np.concatenate([labels_WS[ids.index(name)] for name in first.sample_ids])
    found = first.labels.view(-1)[first.logit_rows_S + 1]
    assert found.tolist() == expected.tolist()
    logits = torch.randn(4, 16, 280, dtype=torch.float64)
    log_s = logits[:, :-1].log_softmax(-1).reshape(-1, 280)
    nll = -log_s[torch.arange(60), torch.from_numpy(expected)].mean()
    assert float(LOSSES["ce"]()(logits, first)) == pytest.approx(float(nll))


def test_draws_differ_by_epoch(bench: Bench) -> None:
    store = bench.stores.store("pps:tau=0.06", seed=0, draws=2)
    labels_WS = bench.stores.labels(seed=0)
    lesson = Lesson(store, labels_WS, {}, epochs=2, draws=2)
    ids = [sample.sample_id for sample in store]
    found = [(ids.index(one.sample_ids[0]), one.signal) for one in batches(lesson, 1, seed=0)]
    assert sorted(row for row, _ in found) == sorted([*range(len(store)), *range(len(store))])
    for place, (row, signal) in enumerate(found):
        stored = store[row, place // len(store)].signal
        assert stored is not None
        assert signal.ids_N.tolist() == stored.ids_N.tolist()
    order = [row for row, _ in found]
    assert order[: len(store)] != order[len(store) :]


def test_cross_entropy_is_that_of_the_dense_teacher() -> None:
    logits_WSV = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    windows = [Text(name, np.arange(4, dtype=np.int32)) for name in "ab"]
    held_out = HeldOut.of_windows(windows, logits_WSV)
    answers = torch.cat([logits_WSV, torch.zeros(2, 1, 8)], dim=1)

    def model(ids_WT: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=answers[: len(ids_WT)])

    own = held_out.cross_entropy(model)  # type: ignore[arg-type]
    assert own == pytest.approx(held_out.entropy, abs=1e-6)
    answers[:, :3] = 0
    flat = held_out.cross_entropy(model)  # type: ignore[arg-type]
    assert flat == pytest.approx(np.log(8), abs=1e-6)


def test_a_run_prints_every_figure_and_can_be_taken_up(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arms = choose_arms(["pps06", "counts50", "topk50_ce", "pps06_draws3"])
    runs = bench.runs(arms, seeds=2)
    results = results_of(arms, runs, seeds=2)
    report(judge(results), {"seeds": 2})
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in printed.splitlines()]
    figures = {line["figure"]: line.get("value") for line in lines}
    for name in ("pps06", "counts50", "topk50_ce", "pps06_draws3"):
        for part in ("gap_closed", "gap_closed_sd", "bytes", "entries", "held_out_ce"):
            assert np.isfinite(figures[f"quality.{name}.{part}"])
    assert {"quality.pps95.bytes", "quality.best_topk.gap_closed"} <= set(figures)
    assert figures["quality.ce.bytes"] == 0
    assert figures["quality.full.gap_closed"] == 1
    assert figures["quality.pps06_draws3.bytes"] > 2 * figures["quality.pps06.bytes"]
    assert bench.loss(arms[0], seed=1) == results[0].held_out_ce[1]
    (tmp_path / "log").write_text(printed)
    done = read_runs(tmp_path / "log", bench.setting.about())
    assert done == runs
    assert [run.arm for run in done] == 2 * [arm.name for arm in arms]
    assert bench.runs(arms, seeds=2, done=done) == runs
    assert "quality.run" not in capsys.readouterr().out
    other = replace(bench.setting, positions=301).about()
    with pytest.raises(ValueError, match="another setting"):
        read_runs(tmp_path / "log", other)


def test_the_mixed_arm_is_a_topk_of_no_family() -> None:
    assert BY_NAME["topk50"].family == "topk"
    assert BY_NAME["topk50_ce"].family == ""
    assert Arm("x", "pps:tau=0.5", draws=2).family == ""
