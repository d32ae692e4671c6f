"""Dumps over a Ray cluster of this machine: same content, also when a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kdstore
from kdstore.progress import Progress
from kdstore.teachers import ray_dump
from kdstore.teachers.ray_dump import RayOptions
from kdstore.teachers.scoring import ScoringOptions
from tests import ray_workers
from tests.conftest import make_texts, run_dump, write_jsonl
from tests.ray_workers import SEEN, VICTIM
from tests.writers.test_dump import assert_same_store

Run = Callable[..., tuple[int, str, str]]
UNITS = 64


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of two CPUs."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    signal.signal(signal.SIGTERM, handler)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many texts as units."""
    rows = [{"id": f"row-{i}", "text": t} for i, t in enumerate(make_texts(UNITS, seed=3))]
    return write_jsonl(tmp_path_factory.mktemp("ray") / "texts.jsonl", rows)


@pytest.fixture
def arguments(teacher_dir: Path, data: Path, tmp_path: Path) -> list[object]:
    """A dump in units of a text each, over Ray."""
    common = ["--teacher", teacher_dir, "--data", data, "--unit-tokens", 1, "--engine", "ray"]
    return [*common, "--out", tmp_path / "store"]


def processes(folder: Path, unit: int | str = "*") -> list[int]:
    """Process ids of the tries of a unit, in order."""
    return [int(path.name.split("-")[-1]) for path in sorted(folder.glob(f"{SEEN}{unit}-*"))]


@pytest.mark.usefixtures("ray")
def test_a_killed_worker_loses_and_changes_nothing(
    arguments: list[object],
    teacher_dir: Path,
    data: Path,
    kdstore_cli: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_dump, "UnitWorker", ray_workers.KilledWorker)
    code, output, error = kdstore_cli("dump", "--quiet", "--json", *arguments)
    assert code == 0, error
    store, alone = tmp_path / "store", tmp_path / "alone"
    found = json.loads(output)
    assert (found["units"], found["samples"], found["complete"]) == ("64 of 64", UNITS, True)
    assert found["score_seconds"] > 0
    killed, again = processes(tmp_path, VICTIM)
    assert killed != again
    assert len(set(processes(tmp_path))) == 3  # two workers, and the one that came back
    run_dump("--teacher", teacher_dir, "--data", data, "--unit-tokens", 1, "--out", alone)
    assert_same_store(store, alone)
    assert [s.sample_id for s in kdstore.open(store)] == [f"row-{i}" for i in range(UNITS)]
    assert kdstore_cli("verify", "--quiet", store)[0] == 0
    assert not (store / "running").exists()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert kdstore_cli("dump", "--quiet", *arguments)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(
    ("worker", "said", "tries", "most"),
    [
        (
            ray_workers.RefusingWorker,
            "it will not\n  where: the unit\n  to do: ask another one",
            1,
            VICTIM + 1,
        ),
        (
            ray_workers.FailingWorker,
            f"unit {VICTIM}\n  got: ZeroDivisionError: by nought",
            4,
            UNITS - 1,
        ),
    ],
)
def test_a_failure_ends_the_dump_with_its_message(
    worker: type,
    said: str,
    tries: int,
    most: int,
    arguments: list[object],
    kdstore_cli: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_dump, "UnitWorker", worker)
    code, _, error = kdstore_cli("dump", "--quiet", *arguments, "--ray-workers", 1)
    assert code == 1
    assert said in error
    assert "Traceback" not in error
    assert len(processes(tmp_path, VICTIM)) == tries
    commits = len(list((tmp_path / "store" / "commits").iterdir()))
    assert VICTIM <= commits <= most  # nothing new after the failure; others go on between tries
    assert kdstore_cli("verify", "--quiet", tmp_path / "store")[0] == 1  # not complete


@pytest.mark.usefixtures("ray")
def test_a_signal_lets_the_units_in_work_finish(
    arguments: list[object], kdstore_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_dump, "UnitWorker", ray_workers.SeenWorker)
    advance = Progress.advance

    def stop(progress: Progress, amount: int) -> None:
        advance(progress, amount)
        if progress.label == "dump" and progress.done == amount:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "advance", stop)
    code, _, error = kdstore_cli("dump", "--quiet", *arguments, "--ray-workers", 1)
    assert code == 1
    assert "stopped by SIGTERM with 2 of 64 units committed" in error
    assert len(list((tmp_path / "store" / "commits").iterdir())) == 2 == len(processes(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "ray", "--unit", "0/2"], "ray does not take --unit"),
        (["--engine", "ray", "--overlay", "a", "--draw", 1], "ray does not take --overlay"),
        (["--ray-workers", 2], "local does not take --ray-workers"),
        (["--ray-resources", "{}"], "local does not take --ray-resources"),
        (["--engine", "ray", "--ray-resources", "[]"], "cannot read --ray-resources"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[object],
    said: str,
    teacher_dir: Path,
    data: Path,
    kdstore_cli: Run,
    tmp_path: Path,
) -> None:
    common = ["--teacher", teacher_dir, "--data", data, "--out", tmp_path / "store"]
    code, _, error = kdstore_cli("dump", *common, *options)
    assert (code, said in error) == (2, True), error
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"num_gpus": 8}, "no room for a worker"),
        ({"num_cpus": 3}, "no room for a worker"),
        ({"num_pigs": 1}, "refuses an option"),
    ],
)
def test_resources_that_there_are_not(
    resources: dict[str, int], said: str, arguments: list[object], kdstore_cli: Run
) -> None:
    given = ["--ray-resources", json.dumps(resources)]
    code, _, error = kdstore_cli("dump", "--quiet", *arguments, *given)
    assert (code, said in error) == (2, True), error


def test_without_the_package(
    arguments: list[object], kdstore_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, error = kdstore_cli("dump", *arguments)
    assert code == 1
    assert "pip install 'kdstore[ray]'" in error
    assert not (tmp_path / "store").exists()


def test_what_a_worker_has_by_default() -> None:
    def found(
        *, has_gpus: bool, resources: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        scoring = ScoringOptions(path="teacher", data="data", **options)
        return RayOptions(resources=resources or {}).of_worker(scoring, has_gpus=has_gpus)

    assert found(has_gpus=True) == {"num_gpus": 1}
    assert found(has_gpus=True, device="cpu") == {"num_cpus": 1}
    assert found(has_gpus=False) == {"num_cpus": 1}
    engine = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    assert found(has_gpus=True, backend="vllm", vllm=engine) == {"num_gpus": 8}
    assert found(has_gpus=True, backend="openai") == {"num_cpus": 1}
    assert found(has_gpus=True, resources={"num_cpus": 3}) == {"num_cpus": 3}
    placed = {"scheduling_strategy": "SPREAD"}
    assert found(has_gpus=True, resources=placed) == {**placed, "num_gpus": 1}


def test_workers_fit_on_single_nodes() -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 9.0}, {"CPU": 64.0}]
    assert ray_dump._room(nodes, {"num_gpus": 4}) == 3
    assert ray_dump._room(nodes, {"num_gpus": 4, "num_cpus": 5}) == 2
    assert ray_dump._room(nodes, {"num_gpus": 0.5}) == 26
