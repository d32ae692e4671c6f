"""Which of several workers a process is: by its command line, or by what started it."""

from __future__ import annotations

from collections.abc import Mapping

from kdstore.errors import UsageError

_SLURM_ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP"))
_LAUNCHERS = (_SLURM_ARRAY, ("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE"))
_WHERE = "--unit auto"


def worker_of(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """The pair (i, N) in ``i/N``, or for ``auto`` what Slurm or torchrun say in the environment.

    Raises UsageError unless 0 <= i < N, and for ``auto`` if nothing says who this is, or two do
    and differ. A launcher of a single process does not count where another has several.
    """
    if text == "auto":
        return _launched(environment)
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        expected = "i/N, i < N, or auto"
        raise UsageError("cannot read the worker", where="--unit", expected=expected, got=text)
    return int(index), int(count)


def _launched(environment: Mapping[str, str]) -> tuple[int, int]:
    found = {
        f"{names[0]} and {names[1]}": _worker(names, environment)
        for names in _LAUNCHERS
        if names[0] in environment
    }
    workers = set(found.values())
    several = {worker for worker in workers if worker[1] > 1} or workers
    if len(several) == 1:
        return several.pop()
    if not several:
        raise UsageError(
            "nothing says which worker this is",
            where=_WHERE,
            expected=" or ".join(f"{names[0]} and {names[1]}" for names in _LAUNCHERS),
            got="none of them in the environment",
            todo="start it with sbatch --array, srun or torchrun, or give --unit i/N",
        )
    raise UsageError(
        "it is not clear which worker this is",
        where=_WHERE,
        expected="one launcher of several processes",
        got=", ".join(f"{names}: {index}/{count}" for names, (index, count) in found.items()),
        todo="give --unit i/N",
    )


def _worker(names: tuple[str, ...], environment: Mapping[str, str]) -> tuple[int, int]:
    """The worker that a launcher's variables name, which for arrays may begin at any number."""
    given = {name: environment[name] for name in names if name in environment}
    if names[1] not in given or not all(value.isdigit() for value in given.values()):
        raise _unusable(names, given)
    numbers = {name.rpartition("_")[2]: int(value) for name, value in given.items()}
    first, step = numbers.get("MIN", 0), numbers.get("STEP", 1)
    index, between = divmod(int(given[names[0]]) - first, max(step, 1))
    count = int(given[names[1]])
    if between or not 0 <= index < count:
        raise _unusable(names, given)
    return index, count


def _unusable(names: tuple[str, ...], given: Mapping[str, str]) -> UsageError:
    return UsageError(
        "the launcher's variables do not tell which worker this is",
        where=_WHERE,
        expected=f"{names[0]} and {names[1]}, evenly spaced numbers",
        got=", ".join(f"{name}={value}" for name, value in given.items()),
        todo="give --unit i/N",
    )
