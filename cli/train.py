"""kdstore train: a student from a store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from kdstore_cli.output import format_value, print_json, print_table


@click.command("train")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in the folder.")
@click.option("--print-config", is_flag=True, help="Print the configuration, all of it, and stop.")
@click.option("--dry-run", is_flag=True, help="Load everything, take one step, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the final figures as JSON.")
@click.option("--quiet", is_flag=True, help="No progress; only the final figures.")
def train(
    config: Path,
    overrides: tuple[str, ...],
    resume: bool,
    print_config: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a student on a store as CONFIG.yaml says.

    KEY=VALUE changes a setting for this run: losses.ce=0.5, training.max_steps=100. Relative
    paths in the file are relative to the current directory.
    """
    if resume + print_config + dry_run > 1:
        raise click.UsageError("only one of --resume, --print-config and --dry-run")
    from kdstore.train import config as configuration

    loaded = configuration.load_config(config, list(overrides))
    if print_config:
        click.echo(configuration.print_config(loaded), nl=False)
        return
    if dry_run:
        from kdstore.train.dryrun import dry_run as run_dry

        _show(run_dry(loaded, quiet=quiet), as_json=as_json)
        return

    from kdstore.train.run import run_training

    _show(run_training(loaded, resume=resume, quiet=quiet), as_json=as_json)


def _show(figures: dict[str, Any], *, as_json: bool) -> None:
    # Under torchrun and accelerate launch every rank comes here with the same figures.
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(figures)
    else:
        print_table(_rows(figures))


def _rows(figures: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, of which a loss is one or first → last, and shapes are rows × tokens."""
    for name, value in figures.items():
        if name == "losses":
            for loss, values in value.items():
                yield loss, " → ".join(map(format_value, _listed(values)))
        elif name == "batch_shapes":
            yield name, ", ".join(f"{rows} × {tokens}" for rows, tokens in value)
        elif value is not None:
            yield name, value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
