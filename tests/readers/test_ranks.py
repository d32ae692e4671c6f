"""Processes of torch.distributed, and accelerate, share a loader's batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain, zip_longest
from pathlib import Path

import kdstore

HERE = Path(__file__).parent


def test_two_processes_share_an_epoch(dump: Callable[..., Path], tmp_path: Path) -> None:
    url = dump()
    # The loopback by name: looking the host's own name up may wait for a network that is not there.
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parents[1]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    launcher = ["-m", "torch.distributed.run", *rendezvous, "--nproc-per-node=2"]
    worker = [str(HERE / "rank_worker.py"), str(url), str(tmp_path)]
    command = [sys.executable, *launcher, *worker]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    alone = [batch.sample_ids for batch in kdstore.open(url).loader(batch_size=7, seed=4)]
    assert [one["ranks"] for one in found] == [[0, 2], [1, 2]]
    assert [len(one["own"]) for one in found] == [5, 5]
    for way in ("own", "dealt"):
        dealt = chain(*zip_longest(*(one[way] for one in found)))
        assert [batch for batch in dealt if batch] == alone
