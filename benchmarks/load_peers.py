"""Peers of ``benchmarks.load``: their environments under build/, and the processes in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / "build" / "peers"
TORCH = "torch==2.13.0"
LONGEST_ANSWER_S = 900


class PeerError(Exception):
    """A peer cannot be installed, started, or does not answer."""


@dataclass(frozen=True)
class Peer:
    """A module of ``benchmarks.peers``, the environment it runs in, and what it can carry."""

    module: str
    environment: str
    requirements: tuple[str, ...]
    selections: tuple[str, ...] = ("pps", "topk50")
    share: float = 1.0  # of the samples; less for one that would take minutes an epoch


# streaming hands locks to forked workers, which newer versions of filelock refuse.
_STREAMING = ("mosaicml-streaming==0.13.0", "transformers==4.57.6", "filelock==3.18.0")
_DATASETS = ("datasets==5.2.0",)
PEERS = {
    "streaming": Peer("streaming_side", "streaming", _STREAMING),
    "litdata": Peer("litdata_side", "litdata", ("litdata==0.2.76",)),
    "datasets": Peer("datasets_side", "datasets", _DATASETS),
    "datasets_rows": Peer("datasets_rows_side", "datasets", _DATASETS),
    "distillkit": Peer("distillkit_side", "datasets", _DATASETS, ("topk50",), 0.05),
}


def is_installed(peer: Peer) -> bool:
    """Whether the peer's environment is there."""
    mark = _folder(peer) / "installed"
    return mark.exists() and mark.read_text() == _wanted(peer)


def install(peer: Peer) -> None:
    """Make the peer's environment unless it is there; PeerError if that fails."""
    if is_installed(peer):
        return
    folder = _folder(peer)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    # torch first: asked for alone and pinned, it is not replaced by a newer build of another kind.
    _run([*pip, TORCH])
    _run([*pip, TORCH, *peer.requirements])
    (folder / "installed").write_text(_wanted(peer))


class Process:
    """A side in a process of its own. It makes its data first: ``ready`` is what it then says."""

    def __init__(self, python: str, module: str, payload: Path, folder: Path) -> None:
        self._log = folder.with_name(f"{folder.name}.log")
        program = [python, "-m", f"benchmarks.peers.{module}", str(payload), str(folder)]
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                program,
                cwd=ROOT,
                env={**os.environ, **settings},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.ready = self._answer()

    def ask(self, do: str, **options: Any) -> Mapping[str, Any]:
        """The answer to a request of ``peers.serve``; PeerError if there is none in 15 minutes."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self) -> Mapping[str, Any]:
        assert self._process.stdout is not None
        alarm = Timer(LONGEST_ANSWER_S, self._process.kill)
        alarm.start()
        line = self._process.stdout.readline()
        alarm.cancel()
        if not line:
            raise PeerError("ended, or had to be: " + self._log.read_text()[-800:])
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


def start(name: str, payload: Path, folder: Path) -> Process:
    """A peer's process, or that of kdstore."""
    if name == "kdstore":
        return Process(sys.executable, "kdstore_side", payload, folder)
    peer = PEERS[name]
    return Process(str(_folder(peer) / "bin" / "python"), peer.module, payload, folder)


def _folder(peer: Peer) -> Path:
    return ENVIRONMENTS / peer.environment


def _wanted(peer: Peer) -> str:
    return " ".join((TORCH, *peer.requirements))


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise PeerError(f"{' '.join(command[:4])}: {ran.stderr[-800:]}")
