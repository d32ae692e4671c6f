"""Two ranks take the steps that one process would: the denominator is global.

accelerate's FSDP plugin falls back to DDP on a CPU without a word, so FSDP2 is tested in a bare
loop here. Trainer with FSDP2 and with ZeRO-3 need GPUs: tests/train/test_gpu_sharded.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train import fsdp_worker
from tests.train.train_helpers import make_trainer, parameters_of, ragged_samples, tiny_model

HERE = Path(__file__).parent


def run_on_two_ranks(worker: str, *arguments: str) -> None:
    """torchrun of a program of this folder, on this machine."""
    root = HERE.parent.parent
    # The loopback by name: looking the host's own name up may wait for a network that is not there.
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    launcher = ["-m", "torch.distributed.run", *rendezvous, "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(HERE / worker), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_ranks_equal_one_process(tmp_path):
    """Ragged micro-batches on both ranks; the second half of each batch has fewer positions."""
    run_on_two_ranks("ddp_worker.py", str(tmp_path))
    found = torch.load(tmp_path / "found.pt")

    model = tiny_model()
    trainer = make_trainer(
        model,
        ragged_samples(16),
        tmp_path,
        losses={"forward_kl": 0.75, "ce": 0.25},
        eval_dataset=ragged_samples(3, seed=5),
        per_device_train_batch_size=8,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    trainer.train()

    torch.testing.assert_close(found["parameters"], parameters_of(model), rtol=0, atol=1e-5)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for ours, theirs in zip(logs, found["logs"], strict=True):
        for name in ("loss", "forward_kl", "ce"):
            assert theirs[name] == pytest.approx(ours[name], abs=1e-5)
    metrics = trainer.evaluate()
    assert found["metrics"]["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)
    assert found["metrics"]["eval_num_tokens"] == metrics["eval_num_tokens"]


@pytest.mark.parametrize("kind", ["tied", "apart"])
def test_fully_sharded_equals_one_process(tmp_path, kind):
    """FSDP2 in a bare loop with DistillHead: parameters are DTensors, five steps come out alike."""
    run_on_two_ranks("fsdp_worker.py", str(tmp_path), kind)
    found = torch.load(tmp_path / "found.pt")
    model = fsdp_worker.make_student(tied=kind == "tied")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    steps = fsdp_worker.batches(0, 1)
    fsdp_worker.train(model, steps, fsdp_worker.count_positions(), world_size=1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
        assert not torch.allclose(value, start[name], atol=1e-3)
