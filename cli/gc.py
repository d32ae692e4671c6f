"""``kdstore gc``: remove what killed processes left behind."""

from __future__ import annotations

from dataclasses import asdict

import click
from kdstore_cli.output import print_json


@click.command()
@click.argument("url")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Hours since the last write; younger files may belong to a running dump.",
)
@click.option("--dry-run", is_flag=True, help="Only list them.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def gc(url: str, older_than: float, dry_run: bool, as_json: bool) -> None:
    """Remove files of the store at URL that no commit names."""
    from kdstore.filesystem import Folder
    from kdstore.writers.gc import find_orphans

    folder = Folder(url)
    orphans = find_orphans(folder, older_than_s=3600 * older_than)
    for orphan in orphans:
        if not dry_run:
            folder.remove(orphan.path)
    if as_json:
        print_json({"removed": not dry_run, "orphans": [asdict(orphan) for orphan in orphans]})
        return
    for orphan in orphans:
        click.echo(f"{orphan.path}  {orphan.bytes:,} bytes")
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(orphans)} orphans {verb}, {sum(o.bytes for o in orphans):,} bytes")
