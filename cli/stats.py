"""``kdstore stats``: sizes, entries, kept mass and fidelity of a store."""

from __future__ import annotations

from typing import Any

import click
from kdstore_cli.output import print_json, print_table


@click.command()
@click.argument("url")
@click.option("--fidelity", is_flag=True, help="Measure the signal at the audited positions.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON document.")
def stats(url: str, fidelity: bool, as_json: bool) -> None:
    """Counts, means and bytes per scored position of the store at URL."""
    import kdstore
    from kdstore.readers.stats import store_stats

    store = kdstore.open(url)
    found = store_stats(store)
    if fidelity:
        from kdstore.readers.fidelity import store_fidelity

        found["fidelity"] = store_fidelity(store)
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
    parts = ("total", "signal", "scalars", "audit", "input_ids", "overlays", "other")
    rows += [(f"bytes per position, {name}", sizes[name]) for name in parts]
    for name, value in found.get("fidelity", {}).items():
        several = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"fidelity: {name.replace('_', ' ')} {part}".rstrip(), v) for part, v in several]
    return rows
