"""FSDP2 with DistillHead: two ranks take the steps that one process would.

accelerate's FSDP plugin falls back to DDP on a CPU without a word, so this is a bare loop. Trainer
with FSDP2 and with ZeRO-3 need GPUs: tests/train/test_gpu_sharded.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.train import fsdp_worker
from tests.train.launch import run_on_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """What two ranks end with, of each kind of student."""
    folder = tmp_path_factory.mktemp("sharded")
    run_on_ranks("fsdp_worker.py", str(folder))
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("kind", fsdp_worker.KINDS)
def test_fully_sharded_equals_one_process(found, kind):
    """FSDP2 in a bare loop with DistillHead: parameters are DTensors, five steps come out alike."""
    model = fsdp_worker.make_student(tied=kind == "tied")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    steps = fsdp_worker.batches(0, 1)
    fsdp_worker.train(model, steps, fsdp_worker.count_positions(), world_size=1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[kind][name], value, rtol=0, atol=1e-5)
        assert not torch.allclose(value, start[name], atol=1e-3)
