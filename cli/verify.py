"""``kdstore verify``: every byte, count and id of a store."""

from __future__ import annotations

import click
from kdstore_cli.output import print_json


@click.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.pass_context
def verify(ctx: click.Context, url: str, as_json: bool, quiet: bool) -> None:
    """Read everything in the store at URL; exit 0 only if all of it checks out."""
    from kdstore.filesystem import Folder
    from kdstore.progress import Progress
    from kdstore.readers.store import Store
    from kdstore.readers.verify import verify_store

    store = Store(Folder(url))  # without a local cache: what counts is what lies there
    with Progress("verify", total=len(store.commits), unit="units", quiet=quiet) as progress:
        report = verify_store(store, on_unit=progress.advance)
    if as_json:
        print_json(report.to_dict())
    else:
        for problem in report.problems:
            click.echo(f"problem: {problem}", err=True)
        verdict = "all checks out" if report.ok else f"{len(report.problems)} problems"
        click.echo(
            f"{report.num_units} units, {report.num_samples} samples, "
            f"{report.num_scored} scored positions: {verdict}"
        )
    ctx.exit(0 if report.ok else 1)
