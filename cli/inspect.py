"""``kdstore inspect``: what is in a store, and one sample as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from kdstore_cli.output import print_json, print_table

from kdstore.errors import UsageError

if TYPE_CHECKING:
    from kdstore.align import TokenTable
    from kdstore.readers.store import Store
    from kdstore.sample import Sample

BAR_WIDTH = 20
ENTRIES_SHOWN = 5


@click.command()
@click.argument("url")
@click.option("--sample", "name", help="A sample's id, or its number.")
@click.option("--signal", default="main", show_default=True, help="Or audit, where there is one.")
@click.option("--positions", type=click.IntRange(min=1), default=20, help="Positions to show.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def inspect(url: str, name: str | None, signal: str, positions: int, as_json: bool) -> None:
    """Show the header and commits of the store at URL, or one of its samples."""
    import kdstore

    store = kdstore.open(url, signal=signal)
    if name is None:
        _show_store(store, as_json)
        return
    sample = store[_index_of(store, name)]
    rows = list(_positions(sample, store.token_table(), positions))
    if as_json:
        print_json({**_summary(sample), "positions": rows})
    else:
        print_table(_summary(sample).items())
        _draw(rows)


def _show_store(store: Store, as_json: bool) -> None:
    identity = store.header.identity
    found = {
        "url": store.folder.url,
        "format_version": store.header.format_version,
        "config_digest": store.config_digest,
        "units": len(store.commits),
        "units_planned": store.header.num_units,
        "samples": len(store),
        "overlays": {name: o.describe() for name, o in store.overlays.found.items()},
        "identity": identity,
        "provenance": store.commits[-1].provenance if store.commits else {},
    }
    if as_json:
        print_json(found)
        return
    print_table((name, value) for name, value in found.items() if not isinstance(value, dict))
    for part in filter(found.get, ("overlays", "identity", "provenance")):
        print_table(_flat(found[part], part))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}")
    else:
        yield name, value


def _index_of(store: Store, name: str) -> int:
    try:
        return store.find(name)
    except KeyError:
        if name.lstrip("-").isdigit() and -len(store) <= int(name) < len(store):
            return int(name)
    raise UsageError(
        "no such sample",
        where=store.folder.url,
        expected=f"a sample id, or a number below {len(store)}",
        got=name,
    )


def _summary(sample: Sample) -> dict[str, Any]:
    return {
        "sample_id": sample.sample_id,
        "num_tokens": sample.num_tokens,
        "num_scored": sample.num_scored,
        "spans": [f"{s.kind}[{s.start}:{s.end}]{'*' * s.supervised}" for s in sample.spans],
    }


def _positions(sample: Sample, table: TokenTable, limit: int) -> Iterator[dict[str, Any]]:
    signal = sample.signal
    if signal is None:
        return
    for row, position in enumerate(sample.positions_S[:limit].tolist()):
        one = signal[row : row + 1]
        order = (-one.logprobs_N).argsort(kind="stable")[:ENTRIES_SHOWN]
        probabilities = one.to_dense(int(one.ids_N.max()) + 1)[0] if one.num_entries else []
        ids = one.ids_N[order].tolist()
        yield {
            "position": position,
            "token": _text(table, int(sample.input_ids_T[position])),
            "entries": one.num_entries,
            "top": [{"token": _text(table, i), "p": float(probabilities[i])} for i in ids],
            **{name: float(values[0]) for name, values in one.scalars.items()},
        }


def _text(table: TokenTable, token_id: int) -> str:
    return repr(table.decode([token_id]).decode("utf-8", "replace"))[1:-1]


def _draw(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        label = f" label {row['label_logprob']:.2f}" if "label_logprob" in row else ""
        click.echo(f"\n{row['position']:>5}  {row['token']!r}{label}, {row['entries']} entries")
        for entry in row["top"]:
            bar = "█" * max(1, round(BAR_WIDTH * entry["p"]))
            click.echo(f"       {entry['p']:7.4f} {bar.ljust(BAR_WIDTH)} {entry['token']!r}")
