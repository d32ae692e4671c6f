"""``kdstore``: the group of all commands, and what an error looks like to its user."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from kdstore.errors import KDStoreError, UsageError

# Loaded when named: `kdstore --help` must not import torch.
COMMANDS = {
    "dump": "write a teacher's signals to a store, or resume that",
    "gc": "remove what killed processes left in a store",
    "inspect": "show what is in a store",
    "stats": "sizes, entries and kept mass of a store",
    "status": "how far a dump has come",
    "train": "train a student on a store",
    "verify": "check every byte, count and id of a store",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"kdstore_cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands' one-line helps, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup)
@click.version_option(package_name="kdstore")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors; anywhere on the line.")
def cli(debug: bool) -> None:
    """The store for teacher signals in language-model distillation."""
    del debug  # main() takes it off the line


def main(args: list[str] | None = None) -> None:
    """Run the command line and leave with 0 (done), 1 (failed) or 2 (wrong usage)."""
    given = sys.argv[1:] if args is None else args
    arguments = [argument for argument in given if argument != "--debug"]
    try:
        sys.exit(_run(arguments))
    except KDStoreError as error:
        if arguments != given:
            raise
        click.echo(f"kdstore: error: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _run(arguments: list[str]) -> Any:
    try:
        return cli.main(args=arguments, prog_name="kdstore", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("kdstore: interrupted; run the same command again to go on", err=True)
        return 1


if __name__ == "__main__":
    main()
