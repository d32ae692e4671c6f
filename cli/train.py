"""kdstore train: a student from a store."""

from __future__ import annotations

import os
from pathlib import Path

import click
from kdstore_cli.output import print_json, print_table


@click.command("train")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the final figures as JSON.")
@click.option("--quiet", is_flag=True, help="No progress; only the final figures.")
def train(
    config: Path, overrides: tuple[str, ...], resume: bool, as_json: bool, quiet: bool
) -> None:
    """Train a student on a store as CONFIG.yaml says.

    KEY=VALUE changes a setting for this run: losses.ce=0.5, training.max_steps=100. Relative
    paths in the file are relative to the current directory.
    """
    from kdstore.train.config import load_config

    loaded = load_config(config, list(overrides))

    from kdstore.train.run import run_training

    metrics = run_training(loaded, resume=resume, quiet=quiet)
    # Under torchrun and accelerate launch every rank comes here with the same figures.
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(metrics)
    else:
        print_table(metrics.items())
