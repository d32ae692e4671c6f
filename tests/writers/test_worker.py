"""Which worker a process is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import kdstore
from kdstore.errors import UsageError
from kdstore.writers.worker import worker_of


def array(**values: object) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "6"}
SBATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "worker"),
    [
        (array(ID=3, COUNT=8, MIN=0, MAX=7, STEP=1), (3, 8)),
        (array(ID=3, COUNT=8), (3, 8)),
        (array(ID=1, COUNT=8, MIN=1), (0, 8)),
        (array(ID=108, COUNT=8, MIN=101), (7, 8)),
        (array(ID=12, COUNT=4, MIN=4, STEP=4), (2, 4)),
        (SRUN, (2, 6)),
        (TORCHRUN, (5, 8)),
        (SBATCH, (0, 1)),
        (SBATCH | array(ID=3, COUNT=8, MIN=0), (3, 8)),
        (SBATCH | TORCHRUN, (5, 8)),
        (SRUN | {"RANK": "2", "WORLD_SIZE": "6"}, (2, 6)),
    ],
)
def test_auto(environment: dict[str, str], worker: tuple[int, int]) -> None:
    assert worker_of("auto", {"HOME": "/", **environment}) == worker


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "nothing says which worker this is"),
        (SRUN | TORCHRUN, "SLURM_PROCID and SLURM_NTASKS: 2/6, RANK and WORLD_SIZE: 5/8"),
        (SRUN | array(ID=0, COUNT=4), "SLURM_PROCID and SLURM_NTASKS: 2/6"),
        ({"RANK": "5"}, "RANK=5"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, "RANK=8, WORLD_SIZE=8"),
        ({"RANK": "x", "WORLD_SIZE": "8"}, "RANK=x"),
        (array(ID=7, COUNT=3, MIN=1), "SLURM_ARRAY_TASK_ID=7"),
        (array(ID=5, COUNT=3, MIN=0, STEP=2), "SLURM_ARRAY_TASK_STEP=2"),
    ],
)
def test_what_does_not_tell(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError) as error:
        worker_of("auto", environment)
    assert said in str(error.value)
    assert "--unit i/N" in str(error.value)


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "1/2/3", "automatic"])
def test_what_is_no_worker(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the worker"):
        worker_of(text, TORCHRUN)
    assert worker_of("1/2", TORCHRUN) == (1, 2)


def test_a_dump_of_two_ranks(dump: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        units = kdstore.open(dump(unit="auto")).commits.units.tolist()
        assert (0 in units) is (rank == 0)
        assert 1 in units
    assert kdstore.open(dump()).is_complete
