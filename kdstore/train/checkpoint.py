"""Checkpoints that are whole or do not count.

transformers writes a checkpoint file by file, so a kill leaves half of one. Ours has one more file,
written when all others are on disk: a folder without it is not gone on from.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdstore.errors import UsageError
from kdstore.localfile import partial_beside, publish, sync_tree, withdraw

STATE_FILE = "kdstore_state.json"
STATE_VERSION = 1
_NAME = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a run is: optimizer steps taken, and the place of its data.

    * ``session``: how many times training had been begun or resumed in the folder: of checkpoints
      of several runs it tells which is newer, as neither steps nor clocks do
    * ``loader``: the state of the loader behind the last batch that was trained on; None for a list
      of samples, of which transformers skips what has been seen
    """

    step: int
    session: int
    loader: dict[str, Any] | None
    version: int = STATE_VERSION


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest folder ``checkpoint-N`` that is complete; None if there is none."""
    complete = [path for path in _checkpoints(folder) if (path / STATE_FILE).is_file()]
    return complete[-1] if complete else None


def new_session(folder: str | Path) -> int:
    """The number of a session that begins now in the folder of a run."""
    last = last_checkpoint(folder)
    state = None if last is None else read_state(last)
    return 0 if state is None else state.session + 1


def write_state(checkpoint: Path, state: TrainingState) -> None:
    """Make a checkpoint complete: sync what is there, then write the file that says so."""
    sync_tree(checkpoint)
    target = checkpoint / STATE_FILE
    with partial_beside(target) as partial:
        partial.write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
        publish(partial, target)


def read_state(checkpoint: str | Path) -> TrainingState | None:
    """What ``write_state`` wrote; None without the file. UsageError for one we do not know."""
    path = Path(checkpoint) / STATE_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["version"]
        if version == STATE_VERSION:
            return TrainingState(**found)
    except (ValueError, TypeError, KeyError) as error:
        version = f"{type(error).__name__}: {error}"
    raise UsageError(
        "this is no state of a run that this kdstore can go on from",
        where=path,
        expected=f"version {STATE_VERSION}",
        got=version,
        todo="go on with the kdstore that wrote it, or from another checkpoint",
    )


def reopen(checkpoint: Path) -> None:
    """Make a checkpoint incomplete, so that its files may be replaced or removed."""
    withdraw(checkpoint / STATE_FILE)


def rotate(folder: str | Path, *, limit: int | None, keep: Iterable[str | Path]) -> None:
    """Remove the oldest checkpoints until ``limit`` are left, none of ``keep``."""
    found = _checkpoints(folder)
    kept = {Path(path).resolve() for path in keep}
    removable = [path for path in found if path.resolve() not in kept]
    for path in removable[: max(len(found) - limit, 0)] if limit else []:
        reopen(path)
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: str | Path) -> list[Path]:
    """Folders ``checkpoint-N``, the oldest first; before them those that are not complete."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_age)


def _age(checkpoint: Path) -> tuple[int, int]:
    state = read_state(checkpoint)
    step = int(checkpoint.name.rpartition("-")[2])
    return (-1 if state is None else state.session, step)
