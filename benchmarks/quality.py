"""What students learn from stored signals, against what the signals cost to store.

    scripts/bench quality --data DIR [--quick] [--seeds N] [--sweep]

Students are trained on labels that were drawn from a teacher (CE), on its whole distributions
(full) and on what stores of every selection hold. The figure is the share of the gap between CE and
full that a student closes, in cross-entropy against the dense teacher at held-out positions.
All arms of a seed begin with the same student, which has learned from labels of other texts, and
have the same labels and order of texts; draws are other ones for every seed. Bytes are the stores'
own figures. ``DIR`` holds ``teacher-32k`` and ``eval.jsonl``; see docs/quality.md.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.figures import machine, print_failure, print_figure
from benchmarks.quality_data import (
    TEACHER,
    TEXTS,
    Stores,
    cut_logits,
    cut_tokenizer,
    read_split,
)
from benchmarks.quality_gap import (
    ARMS,
    QUICK_ARMS,
    TARGET,
    Arm,
    Judged,
    Run,
    best_topk,
    bytes_at,
    choose_arms,
    curve,
    judge,
    missing,
    results_of,
    smallest,
    spread,
)
from benchmarks.quality_students import (
    HeldOut,
    Lesson,
    StudentConfig,
    new_student,
    train_student,
)
from benchmarks.scored import Text
from kdstore.readers.stats import store_stats

BYTES, GAP, NATS = "bytes per position", "of the gap", "nats per position"
RUN = "quality.run"
SWEEP_SEED = 1000  # of no arm
QUICK_POSITIONS = 30_000
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


@dataclass(frozen=True)
class Setting:
    """How much there is to learn from, and who learns.

    ``first`` are the positions whose labels every student is trained on before its arm begins.
    """

    student: StudentConfig = field(default_factory=StudentConfig)
    window: int = 128
    held_out: int = 10_000
    first: int = 30_000
    positions: int = 60_000

    def about(self) -> dict[str, Any]:
        """For the record of a figure."""
        return {
            "positions": self.positions,
            "learning_rate": self.student.learning_rate,
            "threads": torch.get_num_threads(),
            "machine": machine(),
        }


@dataclass(frozen=True, eq=False)
class Bench:
    """Stores to learn from and held-out positions to judge by.

    ``beginners`` keeps the student of each seed that all its arms begin with.
    """

    setting: Setting
    first: Stores
    stores: Stores
    held_out: HeldOut
    beginners: dict[int, LlamaForCausalLM] = field(default_factory=dict)

    @classmethod
    def of_data(cls, data: Path, setting: Setting, folder: Path) -> Bench:
        """Split the texts and ask the teacher, once for all arms and seeds."""
        teacher, vocab_size = data / TEACHER, setting.student.vocab_size
        tokenizer = cut_tokenizer(teacher, vocab_size)
        sizes = setting.held_out, setting.first, setting.positions
        split = read_split(data / TEXTS, tokenizer, window=setting.window, positions=sizes)

        def stores(name: str, windows: list[Text]) -> Stores:
            (folder / name).mkdir()
            logits = cut_logits(teacher, windows, vocab_size)
            return Stores(folder / name, teacher, tokenizer, windows, logits)

        held_out = cut_logits(teacher, split.held_out, vocab_size)
        return cls(
            setting,
            stores("first", split.first),
            stores("train", split.train),
            HeldOut.of_windows(split.held_out, held_out),
        )

    def beginner(self, *, seed: int) -> LlamaForCausalLM:
        """A copy of the student that all arms of a seed begin with."""
        if seed not in self.beginners:
            config = self.setting.student
            config = replace(config, learning_rate=config.first_rate)
            store, labels = self.first.label_store(seed=seed), self.first.labels(seed=seed)
            student = new_student(config, seed=seed)
            lesson = Lesson(store, labels, {"ce": 1.0})
            self.beginners[seed] = train_student(student, config, lesson, seed=seed)
        return copy.deepcopy(self.beginners[seed])

    def loss(self, arm: Arm, *, seed: int) -> float:
        """Held-out nats per position of one student."""
        lesson = Lesson(
            self.stores.store(arm.selection, seed=seed, draws=arm.draws),
            self.stores.labels(seed=seed),
            arm.losses,
            arm.epochs,
            arm.draws,
        )
        beginner = self.beginner(seed=seed)
        student = train_student(beginner, self.setting.student, lesson, seed=seed)
        return self.held_out.cross_entropy(student)

    def run(self, arm: Arm, *, seed: int) -> Run:
        """One student, and the bytes and entries that all of its draws take."""
        loss = self.loss(arm, seed=seed)
        if not arm.stores_signal:
            return Run(arm.name, seed, 0.0, 0.0, 0.0, loss)
        stats = store_stats(self.stores.store(arm.selection, seed=seed, draws=arm.draws))
        size = stats["bytes_per_position"]
        signal = size["signal"] + size["overlays"]
        entries = stats["entries_per_position"] * arm.draws
        return Run(arm.name, seed, signal, size["total"], entries, loss)

    def runs(self, arms: Sequence[Arm], *, seeds: int, done: Sequence[Run] = ()) -> list[Run]:
        """``done`` and what it lacks of all arms and seeds; each run is printed as it ends."""
        runs = list(done)
        for arm, seed in missing(arms, done, seeds=seeds):
            runs.append(run := self.run(arm, seed=seed))
            print_figure(RUN, run.held_out_ce, NATS, **self.setting.about(), run=asdict(run))
        return runs

    def sweep(self) -> None:
        """Print the bounds of the gap at several learning rates, for a seed that no arm has."""
        for rate in RATES:
            student = replace(self.setting.student, learning_rate=rate)
            bench = replace(self, setting=replace(self.setting, student=student))
            for arm in choose_arms(["ce", "full"]):
                loss = bench.loss(arm, seed=SWEEP_SEED)
                print_figure(f"quality.sweep.{arm.name}", loss, NATS, **bench.setting.about())


def read_runs(file: Path, about: dict[str, Any]) -> list[Run]:
    """The runs that earlier calls printed, each once; ValueError if they are of another setting."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line.get("figure") == RUN]
    for line in found:
        if any(line[name] != about[name] for name in ("positions", "learning_rate")):
            raise ValueError(f"a run in {file} is of another setting: {line}")
    runs = [Run(**line["run"]) for line in found]
    return list({(run.arm, run.seed): run for run in runs}.values())


def report(judged: Sequence[Judged], about: dict[str, Any]) -> None:
    """Print what every arm came to, and what the curves say."""
    for one in judged:
        _report_arm(one, about)
    _report_target(judged, about)
    _report_topk(judged, about)


def _report_arm(one: Judged, about: dict[str, Any]) -> None:
    result, name = one.result, f"quality.{one.result.arm.name}"
    about = {**about, "selection": result.arm.selection, "epochs": result.arm.epochs}
    print_figure(f"{name}.bytes", result.signal, BYTES, **about)
    print_figure(f"{name}.bytes_total", result.total, BYTES, **about)
    print_figure(f"{name}.entries", result.entries, "entries per position", **about)
    runs = result.held_out_ce
    print_figure(f"{name}.held_out_ce", float(np.mean(runs)), NATS, runs=runs, **about)
    _with_spread(f"{name}.above_full", one.above_full, NATS, about)
    _with_spread(f"{name}.gap_closed", one.gap_closed, GAP, about)


def _with_spread(name: str, values: Sequence[float], unit: str, about: dict[str, Any]) -> None:
    """A mean over seeds, and their standard deviation where there are several."""
    print_figure(name, float(np.mean(values)), unit, runs=values, **about)
    deviation = spread(values)
    if deviation is not None:
        print_figure(f"{name}_sd", deviation, unit, **about)


def _report_target(judged: Sequence[Judged], about: dict[str, Any]) -> None:
    """The least bytes at the target: of the arms that were run, and between them."""
    reached = smallest(judged, "pps", share=TARGET)
    if reached is None:
        most = max((share for _, share in curve(judged, "pps")), default=float("nan"))
        error = f"no pps arm closes {TARGET:.0%} of the gap; the most is {most:.1%}"
        print_failure("quality.pps95.bytes", error, **about)
    else:
        more = {"arm": reached.result.arm.name, "gap_closed": reached.share, **about}
        print_figure("quality.pps95.bytes", reached.result.signal, BYTES, **more)
    for family in ("pps", "counts", "topk"):
        at = bytes_at(curve(judged, family), TARGET)
        if at is not None:
            print_figure(f"quality.{family}95.bytes_interpolated", at, BYTES, **about)
    counts = next((one for one in judged if one.result.arm.name == "counts50"), None)
    at = None if counts is None else bytes_at(curve(judged, "pps"), counts.share)
    if at is not None:
        print_figure("quality.pps_as_counts50.bytes_interpolated", at, BYTES, **about)


def _report_topk(judged: Sequence[Judged], about: dict[str, Any]) -> None:
    best = best_topk(judged)
    if best is not None:
        more = {"arm": best.result.arm.name, **about}
        print_figure("quality.best_topk.gap_closed", best.share, GAP, **more)
        print_figure("quality.best_topk.bytes", best.result.signal, BYTES, **more)


def _names(text: str, quick: bool) -> tuple[str, ...]:
    if text:
        return tuple(text.split(","))
    return QUICK_ARMS if quick else tuple(arm.name for arm in ARMS)


@click.command()
@click.option(
    "--data",
    required=True,
    envvar="KDSTORE_BENCH_DATA",
    type=click.Path(path_type=Path, exists=True),
    help=f"Folder with {TEACHER} and {TEXTS}.",
)
@click.option("--quick", is_flag=True, help=f"2 seeds, {QUICK_POSITIONS:,} positions, 6 arms.")
@click.option("--seeds", type=int, help="How many; 4, or 2 if --quick.")
@click.option("--arms", default="", help="Names of arms, with commas; all if not given.")
@click.option("--learning-rate", type=float, default=StudentConfig.learning_rate)
@click.option("--sweep", is_flag=True, help="CE and full at several learning rates, no arms.")
@click.option(
    "--done",
    type=click.Path(path_type=Path, exists=True),
    help="What earlier calls printed: their runs are taken, only others are made.",
)
def main(
    data: Path,
    quick: bool,
    seeds: int | None,
    arms: str,
    learning_rate: float,
    sweep: bool,
    done: Path | None,
) -> None:
    """Print a JSON line for each figure."""
    setting = Setting(StudentConfig(learning_rate=learning_rate))
    if quick:
        setting = replace(setting, positions=QUICK_POSITIONS)
    seeds = seeds or (2 if quick else 4)
    about = {**setting.about(), "seeds": seeds}
    chosen = choose_arms(_names(arms, quick))
    runs = read_runs(done, about) if done else []
    if sweep or missing(chosen, runs, seeds=seeds):
        with tempfile.TemporaryDirectory(prefix="quality-") as folder:
            bench = Bench.of_data(data, setting, Path(folder))
            print_figure("quality.teacher.entropy", bench.held_out.entropy, NATS, **about)
            untaught = [bench.held_out.cross_entropy(bench.beginner(seed=s)) for s in range(seeds)]
            mean = float(np.mean(untaught))
            print_figure("quality.beginner.held_out_ce", mean, NATS, runs=untaught)
            if sweep:
                bench.sweep()
                return
            runs = bench.runs(chosen, seeds=seeds, done=runs)
    report(judge(results_of(chosen, runs, seeds=seeds)), about)


if __name__ == "__main__":
    main()
