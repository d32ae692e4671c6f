"""``kdstore status``: how far a dump has come."""

from __future__ import annotations

from typing import Any

import click
from kdstore_cli.output import print_json, print_table


@click.command()
@click.argument("url")
@click.option(
    "--stale-after",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    help="Hours after which a unit in work counts as given up by a worker that was killed.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status(url: str, stale_after: float, as_json: bool) -> None:
    """What is committed in the store at URL, in work, failed and left, and how fast it goes."""
    import kdstore
    from kdstore.readers.status import dump_status

    found = dump_status(kdstore.open(url), stale_after_s=3600 * stale_after)
    if as_json:
        print_json(found)
        return
    records, overlays = found.pop("records"), found.pop("overlays")
    rows = [(name, value) for name, value in found.items() if value is not None]
    rows += [(f"overlay {name}", progress) for name, progress in overlays.items()]
    print_table([*rows, *map(_row, records)])


def _row(record: dict[str, Any]) -> tuple[str, str]:
    from tqdm import tqdm

    name = f"unit {record['unit']}"
    if record["overlay"] is not None:
        name += f" of {record['overlay']}"
    since = tqdm.format_interval(record["age_s"])
    text = f"{record['state']} since {since} on {record['host']}, process {record['pid']}"
    return name, text if record["error"] is None else f"{text}: {record['error']}"
