"""What a process of a kill test runs: a dump with some arguments."""

from __future__ import annotations

import torch
from kdstore_cli.main import main


def dump(arguments: list[str]) -> None:
    """Run it on one thread, and leave with its exit code."""
    torch.set_num_threads(1)
    main(["dump", *arguments])
