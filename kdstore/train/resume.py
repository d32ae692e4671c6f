"""Which runs go on from which: what a checkpoint must share with its run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from kdstore.errors import StoreMismatchError, UsageError
from kdstore.train import checkpoint
from kdstore.train.config import TrainConfig
from kdstore.train.sources import stores_of

RUN_FILE = "run.json"


def last_checkpoint(config: TrainConfig, data: Any) -> str:
    """The last checkpoint in the output folder, if it is one of this very run.

    Raises UsageError if there is none, StoreMismatchError naming the setting that differs.
    """
    folder = config.output_dir
    found = checkpoint.last_checkpoint(folder)
    if found is None or not (folder / RUN_FILE).exists():
        raise UsageError(
            "nothing to resume",
            where=folder,
            expected=f"a folder checkpoint-N, and {RUN_FILE}",
            got="none",
            todo="leave out --resume, or set training.save_steps in the run to be resumed",
        )
    recorded = json.loads((folder / RUN_FILE).read_text())
    for name, value in _identity(config, data).items():
        if recorded.get(name) != value:
            raise StoreMismatchError(
                f"the checkpoint is of another run: {name} differs",
                where=folder,
                expected=recorded.get(name),
                got=value,
                todo="repeat the settings of that run, or train into a new output_dir",
            )
    return str(found)


def record_run(config: TrainConfig, data: Any) -> None:
    """Write what a later run must share to go on from this one."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_identity(config, data), indent=2)
    (config.output_dir / RUN_FILE).write_text(text + "\n")


def _identity(config: TrainConfig, data: Any) -> dict[str, Any]:
    stores = stores_of(data)
    settings = asdict(config)
    names = ("student", "lora", "freeze", "losses", "loader", "weights", "seed")
    return {
        "store": [store.config_digest for store in stores],
        "draws": [store.num_draws for store in stores],
        "shares": [member.weight for member in config.mixture or []],
        "teachers": list(config.teachers),
        **{name: settings[name] for name in names},
    }
