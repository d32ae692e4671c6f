"""torchrun of a program of this folder, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LONGEST_S = 300  # gloo may wait for ever for a rank that is gone


def run_on_ranks(worker: str, *arguments: str, ranks: int = 2) -> None:
    """Run it with so many ranks; its errors are those of the test."""
    root = HERE.parent.parent
    # The loopback by name: looking the host's own name up may wait for a network that is not there.
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    launcher = ["-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, str(HERE / worker), *arguments]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
