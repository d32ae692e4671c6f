"""Which of how many training processes this is."""

from __future__ import annotations

import os

import torch.distributed

from kdstore.errors import UsageError


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """What is given, else torch.distributed's, else that of RANK and WORLD_SIZE, else 0 of 1.

    Raises UsageError where only one is given, or the rank is none.
    """
    if (rank is None) != (world_size is None):
        raise UsageError(
            "rank and world_size belong together",
            expected="both, or neither",
            got=f"rank={rank}, world_size={world_size}",
        )
    if rank is None or world_size is None:
        rank, world_size = _found()
    if not 0 <= rank < world_size:
        raise UsageError("no such rank", expected=f"0 to {world_size - 1}", got=rank)
    return rank, world_size


def _found() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise UsageError(
            "RANK and WORLD_SIZE are no numbers",
            where="environment",
            expected="integers, as torchrun sets them",
            got=error,
            todo="unset them, or pass rank and world_size",
        ) from error
