"""``kdstore status``: how far a dump has come."""

from __future__ import annotations

import click
from kdstore_cli.output import print_json, print_table


@click.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status(url: str, as_json: bool) -> None:
    """Units and tokens that are committed in the store at URL, of those that are planned."""
    import kdstore

    store = kdstore.open(url)
    found = {
        "complete": store.is_complete,
        "units": len(store.commits),
        "units_planned": store.header.num_units,
        "samples": len(store),
        "tokens": int(store.shard_tokens.sum()),
        "scored": int(store.commits.numbers("scored").sum()),
        "seconds": sum(commit.provenance.get("seconds", 0.0) for commit in store.commits),
    }
    overlays = {name: overlay.progress for name, overlay in store.overlays.found.items()}
    if as_json:
        print_json({**found, "overlays": overlays})
    else:
        print_table([*found.items(), *((f"overlay {name}", p) for name, p in overlays.items())])
