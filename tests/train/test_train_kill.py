"""kill -9 of a training run, again and again, changes no bit of what it ends with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdstore.train.checkpoint import last_checkpoint, read_state
from tests.train import kill_worker
from tests.train.stores import write_store

KILLS = 3


class Run:
    """A process that trains; ``steps`` are those it has reported."""

    def __init__(self, context: Any, *arguments: Any) -> None:
        self._reports, pipe = context.Pipe(duplex=False)
        self._process = context.Process(target=kill_worker.train, args=(*arguments, pipe))
        self._process.start()
        pipe.close()

    def next_step(self) -> int | None:
        """The next report; None once there is none to come."""
        try:
            return int(self._reports.recv())
        except EOFError:
            return None

    def kill(self, *, after_s: float) -> None:
        """SIGKILL a little later, where it may be in the middle of a save."""
        self._process.join(after_s)
        self._process.kill()
        self._process.join()

    def join(self) -> int:
        self._process.join()
        return int(self._process.exitcode)


def run_with_kills(context: Any, *arguments: Any, options: Any) -> list[int]:
    """Begin and resume until the run has been killed often and ends; the steps it began with."""
    store, folder = arguments
    began = []
    for attempt in range(KILLS + 1):
        run = Run(context, store, folder, 2 * (attempt % 2), options)
        began.append(run.next_step() or 0)
        if attempt == KILLS:
            assert run.join() == 0
        else:
            for _ in range(random.randrange(2) + (attempt == 0)):
                run.next_step()
            run.kill(after_s=random.uniform(0, 0.05))
    return [step for step in began if step]  # 0: the run was over, as on a fast machine it may be


def content(checkpoint: Path) -> dict[str, Any]:
    """Weights, and the states of optimizer, scheduler and random numbers."""
    names = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    states = {name: torch.load(checkpoint / name, weights_only=False) for name in names}
    return {"model": load_file(checkpoint / "model.safetensors"), **states}


def assert_same(found: Any, wanted: Any) -> None:
    """Equal in every bit, whatever they are."""
    if isinstance(wanted, torch.Tensor | np.ndarray):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        assert_same(list(found.values()), list(wanted.values()))
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted


@pytest.mark.parametrize(
    "options",
    [
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "num_train_epochs": 2.6,
        },
        {"loader": {"pack": True, "batch_tokens": 48, "max_length": 24}, "max_steps": 13},
    ],
    ids=["padded", "packed"],
)
def test_killed_runs_end_like_one(tmp_path, processes, options):
    """Workers come and go between attempts, so the result does not depend on them either."""
    store = tmp_path / "store"
    write_store(store, count=36)
    whole = Run(processes, store, tmp_path / "whole", 0, options)
    assert whole.join() == 0
    began = run_with_kills(processes, store, tmp_path / "killed", options=options)
    ends = [last_checkpoint(tmp_path / name) for name in ("whole", "killed")]
    assert ends[0].name == ends[1].name
    states = [read_state(end) for end in ends]
    assert [state.step for state in states] == [13, 13]
    assert states[0].loader == states[1].loader
    assert_same(content(ends[1]), content(ends[0]))
    assert began == sorted(began)
    assert began[1] > 1
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) <= 3
