"""A dump over Ray: workers with a teacher each, a unit a task, tried again if its worker dies.

Ray places and restarts the workers. All they share is the store, where a unit that was run twice is
committed once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdstore.errors import KDStoreError, MissingDependencyError, TeacherError, UsageError
from kdstore.teachers.ray_worker import UnitWorker
from kdstore.teachers.scoring import ScoringOptions
from kdstore.writers.pipeline import RunReport
from kdstore.writers.plan import PlannedUnit
from kdstore.writers.stopping import Stopping

UNITS_PER_WORKER = 2  # one is scored, the other one read or committed
RETRIES = 3  # of a unit whose worker died, or failed in a way that may pass
CLOSING_S = 30.0
_RESOURCES = "--ray-resources"


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How many workers, and Ray's options of each one, such as ``num_gpus``; see ``of_worker``.

    Without a number there are as many as the cluster has room for now, or one for a teacher that is
    a server.
    """

    workers: int | None = None
    resources: dict[str, Any] = field(default_factory=dict)

    def of_worker(self, scoring: ScoringOptions, *, has_gpus: bool) -> dict[str, Any]:
        """Ray's options of a worker; if none asks for room, a GPU for each part of its teacher.

        Or a CPU, where there are no GPUs or the teacher does not compute here.
        """
        if self.resources.keys() & {"num_cpus", "num_gpus", "resources"}:
            return self.resources
        on_gpu = has_gpus and scoring.backend != "openai" and scoring.device != "cpu"
        parts = ("tensor_parallel_size", "pipeline_parallel_size")
        size = int(scoring.vllm.get(parts[0], 1)) * int(scoring.vllm.get(parts[1], 1))
        return {**self.resources, "num_gpus" if on_gpu else "num_cpus": size}


def import_ray() -> Any:
    """The module; MissingDependencyError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "the engine ray needs the package", where="--engine", todo="pip install 'kdstore[ray]'"
        ) from error
    return ray


class RayDump:
    """Commits units by workers on the cluster of RAY_ADDRESS, on one that runs here, or on its own.

    No worker is given a unit after a failure or a stop; the units in work are finished.
    """

    def __init__(
        self, scoring: ScoringOptions, out: str, options: RayOptions, *, stopping: Stopping
    ) -> None:
        self.report = RunReport()
        self._scoring, self._out, self._options = scoring, out, options
        self._stopping = stopping
        self._ray = import_ray()
        self._in_work: dict[Any, tuple[Any, PlannedUnit]] = {}  # by Ray's reference of the task
        self._closing: list[Any] = []
        self._errors: list[KDStoreError] = []

    def run(self, planned: Sequence[PlannedUnit], *, on_tokens: Callable[[int], None]) -> None:
        """Raises the first error that a worker gave back, and TeacherError if one was lost."""
        # Ray's own messages, from a thread of its own, would else be among the results
        with redirect_stdout(sys.stderr), _connected(self._ray):
            try:
                self._run(planned, on_tokens)
            except BaseException:
                for worker, _ in self._in_work.values():
                    self._ray.kill(worker)
                raise
        if self._errors:
            raise self._errors[0]

    def _run(self, planned: Sequence[PlannedUnit], on_tokens: Callable[[int], None]) -> None:
        workers, waiting = self._start(len(planned)), iter(planned)
        for _ in range(UNITS_PER_WORKER):
            for worker in workers:
                self._give(worker, waiting)
        del workers, worker  # Ray ends a worker that nobody knows, and has its place back
        while self._in_work:
            (task, *_), _ = self._ray.wait(list(self._in_work))
            worker, unit = self._in_work.pop(task)
            try:
                self.report.add(self._result(task, unit))
                on_tokens(unit.num_tokens)
            except KDStoreError as error:
                self._errors.append(error)
            self._give(worker, waiting)
            del worker
        if self._closing:
            self._ray.wait(self._closing, num_returns=len(self._closing), timeout=CLOSING_S)

    def _start(self, num_units: int) -> list[Any]:
        """The workers, which Ray starts as soon as there is room for them."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        has_gpus = any(node.get("GPU") for node in nodes)
        resources = self._options.of_worker(self._scoring, has_gpus=has_gpus)
        made = self._worker_class(resources)
        wanted = self._options.workers
        if wanted is None:
            wanted = 1 if self._scoring.backend == "openai" else _room(nodes, resources)
        self.report.workers = min(wanted, num_units)
        arguments = self._scoring, self._out, str(Path.cwd())
        return [made.remote(*arguments) for _ in range(self.report.workers)]

    def _worker_class(self, resources: dict[str, Any]) -> Any:
        settings = {
            **resources,
            "max_restarts": -1,
            "max_task_retries": RETRIES,
            "max_concurrency": UNITS_PER_WORKER,
        }
        try:
            return self._ray.remote(UnitWorker).options(**settings)
        except (TypeError, ValueError) as error:
            raise UsageError(
                "Ray refuses an option of its workers", where=_RESOURCES, got=error
            ) from error

    def _give(self, worker: Any, waiting: Iterator[PlannedUnit]) -> None:
        """The next unit to a worker; if there is none, it ends after those that it has."""
        over = self._errors or self._stopping.asked_by
        unit = None if over else next(waiting, None)
        if unit is not None:
            task = worker.dump.options(retry_exceptions=True).remote(unit.unit)
            self._in_work[task] = worker, unit
        elif all(other is not worker for other, _ in self._in_work.values()):
            self._closing.append(worker.close.remote())

    def _result(self, task: Any, unit: PlannedUnit) -> RunReport:
        """What a task did; its own KDStoreError, or TeacherError for what Ray says of it."""
        where = f"unit {unit.unit}"
        try:
            found: RunReport | KDStoreError = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise TeacherError(
                f"a worker failed, also when the unit was tried again {RETRIES} times",
                where=where,
                got=f"{type(error.cause).__name__}: {error.cause}",
                todo="--debug shows where it failed",
            ) from error
        except self._ray.exceptions.RayError as error:
            raise TeacherError(
                f"the worker was lost, also when the unit was tried again {RETRIES} times",
                where=where,
                got=error,
                todo="see Ray's logs; a process that is killed again and again lacks memory",
            ) from error
        if isinstance(found, KDStoreError):
            raise found
        return found


def _room(nodes: list[dict[str, float]], resources: dict[str, Any]) -> int:
    """How many workers fit on the nodes of a cluster; UsageError if none does."""
    needs = {"CPU": resources.get("num_cpus"), "GPU": resources.get("num_gpus")}
    needs |= resources.get("resources") or {}
    wanted = {name: float(need) for name, need in needs.items() if need}
    rooms = [
        min((int(node.get(n, 0) // w) for n, w in wanted.items()), default=0) for node in nodes
    ]
    if not sum(rooms):
        raise UsageError(
            "the cluster has no room for a worker",
            where=_RESOURCES,
            expected=f"a node with {wanted}",
            got=[{name: node.get(name, 0) for name in ("CPU", "GPU")} for node in nodes],
            todo="ask for less, or give --ray-workers where the cluster grows on demand",
        )
    return sum(rooms)


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """In a cluster, that of the caller if there is one; handlers of signals stay as they are."""
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "this machine")
        raise UsageError("no Ray cluster to join", where=address, got=error) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()
