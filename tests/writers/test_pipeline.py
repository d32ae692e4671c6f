"""The dump pipeline: what runs at once, what is held, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kdstore
from kdstore.errors import StoppedError
from kdstore.filesystem import Folder
from kdstore.layout import RUNNING
from kdstore.writers import pipeline, stopping
from kdstore.writers.reading import planned_samples
from kdstore.writers.scored import dump_unit
from kdstore.writers.trace import read_traces
from tests.writers.pipelines import WAIT_S, Work, join_stage, stage_threads

MakeWork = Callable[..., Work]


@pytest.fixture
def work(tmp_path: Path, teacher_dir: Path, data_file: Path) -> MakeWork:
    def make(name: str = "store", **options: Any) -> Work:
        return Work.at(Folder(tmp_path / name), teacher_dir, data_file, **options)

    return make


def hashes(work: Work) -> list[str]:
    return kdstore.open(work.writer.folder.url).commits.texts("xxh3_128")


def reached(count: Callable[[], int], at_least: int) -> None:
    """Waits until a count of other threads has got so far."""
    ready = threading.Event()
    for _ in range(WAIT_S * 200):
        if count() >= at_least:
            return
        ready.wait(0.005)
    pytest.fail(f"{count()} instead of {at_least}")


def test_units_scored_one_by_one_are_the_same_bytes(work: MakeWork) -> None:
    """As an actor would do them: any unit, any order."""
    together, apart = work("together"), work("apart")
    together.run()
    for unit in reversed(apart.planned):
        ((_, samples),) = planned_samples(apart.scoring.source, [unit])
        dump_unit(apart.writer, apart.teacher, unit, samples)
    assert len(hashes(apart)) > 8
    assert hashes(apart) == hashes(together)


@pytest.mark.parametrize(("lane_bytes", "held"), [(1 << 30, 4), (1, 2)])
def test_what_is_held_is_bounded_and_that_much_runs_ahead(
    work: MakeWork, monkeypatch: pytest.MonkeyPatch, lane_bytes: int, held: int
) -> None:
    """Beyond the unit that is scored: one read ahead, and two that wait if they are small."""
    monkeypatch.setattr(pipeline, "MAX_LANE_BYTES", lane_bytes)
    one = work()
    units = len(one.planned)
    ahead: list[int] = []

    def on_commit(unit: int) -> None:
        reached(lambda: len(one.read), min(units, len(one.committed) + held))
        ahead.append(len(one.read) - len(one.committed))

    one.on_commit = on_commit
    one.on_read = lambda unit: ahead.append(len(one.read) - len(one.committed))
    assert one.run_in_time() is None
    assert len(one.committed) == units > 8
    assert max(ahead) == held


@dataclass(frozen=True)
class Case:
    """A stage fails at a unit, once ``until`` holds; another is held up at a unit till then."""

    stage: str
    unit: int
    until: tuple[str, int] = ("read", 0)  # units that have been begun to read, or scored
    held: tuple[str, int] | None = None


FAILURES = {
    "read, score waits for a unit": Case("read", 1, until=("scored", 1)),
    "read, the teacher scores": Case("read", 1, held=("score", 0)),
    "read, score waits for room": Case("read", 3, until=("scored", 3), held=("commit", 0)),
    "score, read waits for room": Case("score", 1, until=("read", 3)),
    "score, commit is busy": Case("score", 1, held=("commit", 0)),
    "commit, score waits for a unit": Case("commit", 0, held=("read", 1)),
    "commit, score waits for room": Case("commit", 0, until=("scored", 3)),
    "commit, the teacher scores": Case("commit", 0, held=("score", 1)),
}


def disturb(work: Work, case: Case) -> None:
    """Hooks the case into a dump."""
    failing = threading.Event()

    def fail(unit: int) -> None:
        if unit == case.unit:
            name, count = case.until
            reached(lambda: len(getattr(work, name)), count)
            failing.set()
            raise ZeroDivisionError("on purpose")

    def hold(unit: int) -> None:
        if case.held and unit == case.held[1]:
            assert failing.wait(WAIT_S)

    setattr(work, f"on_{case.stage}", fail)
    if case.held:
        setattr(work, f"on_{case.held[0]}", hold)


@pytest.mark.parametrize("name", FAILURES)
def test_the_first_failure_ends_all_with_its_own_error(work: MakeWork, name: str) -> None:
    one, case = work(), FAILURES[name]
    disturb(one, case)
    error = one.run_in_time()
    assert isinstance(error, ZeroDivisionError)
    assert str(error) == "on purpose"
    if case.stage == "commit":
        assert one.committed == []
    else:  # what was scored is kept, but perhaps the unit that was ended in its last score
        assert one.committed == one.scored[: len(one.committed)]
        assert len(one.scored) - len(one.committed) <= (case.stage == "read")
    out = Path(one.writer.folder.url)
    assert [path.name for path in out.rglob("*.partial")] == []
    assert len(list((out / "data").glob("*"))) == len(one.committed)
    (trace,) = read_traces(one.writer.folder, committed=one.committed)
    assert (trace.unit, trace.error) == (case.unit, "ZeroDivisionError: on purpose")
    assert (trace.host, trace.pid) == (socket.gethostname(), os.getpid())
    again, whole = work(), work("whole")
    again.run()
    whole.run()
    assert not set(again.committed) & set(one.committed)
    assert hashes(again) == hashes(whole)
    again.writer.seal()
    assert not (out / RUNNING).exists()


def test_scoring_ends_at_the_next_score(work: MakeWork) -> None:
    one = work()

    def on_score(unit: int) -> None:
        if unit == 1 and not ended:
            scoring.set()
            join_stage("commit")  # it has failed
            ended.append(one.num_scores)

    def on_commit(unit: int) -> None:
        scoring.wait(WAIT_S)
        raise ZeroDivisionError("on purpose")

    ended: list[int] = []
    scoring = threading.Event()
    one.on_score, one.on_commit = on_score, on_commit
    error = one.run_in_time()  # while it is kept, so are the frames that it went through
    assert isinstance(error, ZeroDivisionError)
    assert one.num_scores == ended[0] + 1
    assert one.closed == [0, 1]


def test_a_run_tells_its_stages(work: MakeWork) -> None:
    one = work()
    report = one.run()
    store = kdstore.open(one.writer.folder.url)
    tokens = int(store.shard_tokens.sum())
    assert (report.units, report.tokens, report.tokens_scored) == (
        len(store.commits),
        tokens,
        tokens,
    )
    assert report.bytes == sum(commit.shard.bytes for commit in store.commits)
    sums = dict.fromkeys(("read", "wait", "write"), 0.0)
    for commit in store.commits:
        provenance = commit.provenance
        assert provenance["seconds"] > 0
        for stage in sums:
            sums[stage] += provenance[f"{stage}_seconds"]
    assert 0 < sums["read"] <= report.stages["read"] + 0.001 * report.units
    assert 0 < sums["write"] <= report.stages["write"] + 0.001 * report.units
    found = report.to_dict()
    assert found["tokens_per_s"] == pytest.approx(tokens / found["seconds"], rel=0.01)
    assert found["score_seconds"] + found["wait_seconds"] <= found["seconds"] + 0.01


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_was_begun(work: MakeWork, number: signal.Signals) -> None:
    one = work()
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    once = iter([True])
    one.on_score = lambda unit: send(number) if unit == 1 and next(once, False) else None
    with pytest.raises(StoppedError, match="run the same command again") as stopped:
        one.run()
    assert number.name in str(stopped.value)
    assert one.committed == [0, 1]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert read_traces(one.writer.folder, committed=()) == []
    again, whole = work(), work("whole")
    again.run()
    whole.run()
    assert hashes(again) == hashes(whole)


def test_a_signal_in_the_last_unit_is_no_failure(work: MakeWork) -> None:
    one = work()
    last, once = one.planned[-1].unit, iter([True])
    one.on_score = lambda unit: send(signal.SIGTERM) if unit == last and next(once, False) else None
    assert one.run().units == last + 1


def test_a_signal_is_heard_while_the_teacher_waits_for_a_unit(work: MakeWork) -> None:
    one = work()

    def on_read(unit: int) -> None:
        if unit == 1:
            reached(lambda: len(one.committed), 1)
            send(signal.SIGTERM)

    one.on_read = on_read
    with pytest.raises(StoppedError):
        one.run()
    assert one.committed[:1] == [0]
    assert len(one.committed) <= 2


def test_the_same_signal_again_stops_at_once(work: MakeWork) -> None:
    one = work()
    one.on_score = lambda unit: send(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    assert (one.committed, stage_threads()) == ([], [])


def test_signals_are_left_alone_unless_asked_for(work: MakeWork) -> None:
    """A training run that records must not lose one."""
    one = work()
    one.stop_on_signals, seen = False, []
    one.on_score = lambda unit: seen.append(signal.getsignal(signal.SIGTERM))
    one.run()
    assert set(seen) == {signal.getsignal(signal.SIGTERM)}


def test_a_launcher_may_pass_on_what_the_terminal_has_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now_s[0])
    with stopping.stopping_on_signals(quiet=True) as asked:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert asked.asked_by == "SIGINT"
        now_s[0] += 2 * stopping.PASSED_ON_S
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)


def test_handlers_of_others_stay() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with stopping.stopping_on_signals(quiet=True) as asked:
            send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (seen, asked.asked_by) == ([signal.SIGTERM], None)
