"""What each rank of the FSDP2 test runs: a bare loop of five steps on a sharded student."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kdstore.errors import UsageError
from kdstore.readers.collate import Batch, Collator
from kdstore.train.head import DistillHead, Request
from kdstore.train.objective import Objective
from tests.train.train_helpers import ragged_samples, tiny_config, tiny_model

STEPS, SAMPLES = 5, 8
KINDS = ("tied", "apart")  # the head with the embeddings; a head that is sharded on its own
OBJECTIVE = {"forward_kl": 0.75, "ce": 0.25}


def make_student(*, tied: bool) -> Any:
    """The student of every process."""
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    DistillHead.attach(model, chunk_tokens=4)
    return model


def batches(rank: int, world_size: int) -> list[list[Batch]]:
    """Of each step, this rank's share."""
    steps = [ragged_samples(SAMPLES, seed=step) for step in range(STEPS)]
    return [[Collator()(samples[rank::world_size])] for samples in steps]


def train(model: Any, steps: list[list[Batch]], counts: list[int], *, world_size: int) -> None:
    """Plain SGD; every step is over the scored positions of all ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    objective = Objective(OBJECTIVE)
    for step, count in zip(steps, counts, strict=True):
        for batch in step:
            request = Request(objective, batch, denominator=count)
            loss = model(**batch.model_inputs(), distill=request).loss
            (world_size * loss).backward()  # the ranks' gradients are averaged
        optimizer.step()
        optimizer.zero_grad()


def count_positions() -> list[int]:
    """Scored positions of each step, on all ranks."""
    return [sum(s.num_scored for s in ragged_samples(SAMPLES, seed=step)) for step in range(STEPS)]


def shard(model: Any, *, head_apart: bool) -> None:
    """Each layer a group, the rest another; or the head one of its own."""
    for layer in model.model.layers:
        fully_shard(layer)
    if head_apart:
        fully_shard(model.lm_head)
    fully_shard(model)


def train_sharded(rank: int, world_size: int, *, kind: str) -> dict[str, torch.Tensor]:
    """Train on this rank's share; the whole weights."""
    model = make_student(tied=kind == "tied")
    shard(model, head_apart=kind == "apart")
    assert all(isinstance(one, DTensor) for one in model.parameters())
    steps = batches(rank, world_size)
    train(model, steps, count_positions(), world_size=world_size)
    assert all(isinstance(one, DTensor) for one in model.parameters())
    refuse_outside(model, steps[0][0])
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def refuse_outside(model: Any, batch: Batch) -> None:
    """Called past the model's forward, the head has no whole weight."""
    head = model.get_output_embeddings()
    hidden = torch.zeros(batch.input_ids.numel(), head.in_features)
    with pytest.raises(UsageError, match="called outside the model's forward"):
        DistillHead.forward(head, hidden, Request(Objective(OBJECTIVE), batch))


def main(folder: Path) -> None:
    """Each kind of student; rank 0 writes what they end with."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = {kind: train_sharded(rank, world_size, kind=kind) for kind in KINDS}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
