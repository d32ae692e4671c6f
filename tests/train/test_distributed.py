"""Two ranks take the step that one process would: the denominator is global."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.train_helpers import make_trainer, parameters_of, ragged_samples, tiny_model

HERE = Path(__file__).parent


def test_two_ranks_equal_one_process(tmp_path):
    """Ragged micro-batches on both ranks; the second half of each batch has fewer positions."""
    root = HERE.parent.parent
    # The loopback by name: looking the host's own name up may wait for a network that is not there.
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    launcher = ["-m", "torch.distributed.run", *rendezvous, "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(HERE / "ddp_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
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
