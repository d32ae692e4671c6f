"""Workers of a dump over Ray that have something happen to them. Ray's processes import this."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from kdstore.errors import KDStoreError, TeacherError
from kdstore.teachers.ray_worker import UnitWorker
from kdstore.writers.pipeline import RunReport

SEEN = "seen-"
VICTIM = 21  # the unit that something happens to


class SeenWorker(UnitWorker):
    """Leaves a file of its process and of each try of a unit, beside the store."""

    def __init__(self, options: Any, out: str, directory: str) -> None:
        super().__init__(options, out, directory)
        self.folder = Path(out).parent

    def dump(self, unit: int) -> RunReport | KDStoreError:
        """As ever."""
        tries = len(list(self.folder.glob(f"{SEEN}{unit}-*")))
        (self.folder / f"{SEEN}{unit}-{tries}-{os.getpid()}").touch()
        return super().dump(unit)

    def _score(self, unit: Any, *arguments: Any) -> Any:
        if unit.unit == VICTIM:
            self.happen()
        return super()._score(unit, *arguments)

    def happen(self) -> None:
        """What happens while the unit is scored."""


class KilledWorker(SeenWorker):
    """The first one that scores the unit is killed in the middle of it."""

    def happen(self) -> None:
        """Dies, unless that has happened."""
        if len(list(self.folder.glob(f"{SEEN}{VICTIM}-*"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class RefusingWorker(SeenWorker):
    """Its teacher refuses the unit."""

    def happen(self) -> None:
        """Refuses it."""
        raise TeacherError("it will not", where="the unit", todo="ask another one")


class FailingWorker(SeenWorker):
    """It fails with what is no error of kdstore."""

    def happen(self) -> None:
        """Fails, each time."""
        raise ZeroDivisionError("by nought")
