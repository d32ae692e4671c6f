"""``kdstore stats``: sizes, entries and kept mass of a store."""

from __future__ import annotations

from typing import Any

import click
from kdstore_cli.output import print_json, print_table


@click.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON document.")
def stats(url: str, as_json: bool) -> None:
    """Counts, means and bytes per scored position of the store at URL."""
    import kdstore
    from kdstore.readers.stats import store_stats

    found = store_stats(kdstore.open(url))
    if as_json:
        print_json(found)
    else:
        print_table(_rows(found))


def _rows(found: dict[str, Any]) -> list[tuple[str, Any]]:
    sizes = found["bytes_per_position"]
    rows = [
        (name, found[name]) for name in ("selection", "num_samples", "num_tokens", "num_scored")
    ]
    rows.append(("units", f"{found['num_units']} of {found['num_units_planned']}"))
    rows += [(name, found[name]) for name in ("entries_per_position", "kept_mass", "padding_mass")]
    rows += [(f"mean {name}", value) for name, value in found["mean_scalars"].items()]
    rows += [(name, found[name]) for name in ("bytes_total", "bytes_store")]
    parts = ("total", "signal", "scalars", "input_ids", "overlays", "other")
    return rows + [(f"bytes per position, {name}", sizes[name]) for name in parts]
