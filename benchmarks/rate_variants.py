"""Variants of what codecs and files do, each on the same signals: the tables of docs/rate.md.

    scripts/bench rate_variants --teacher PATH --texts FILE.jsonl [--cache FOLDER] [--only NAME]

Bytes are per scored position, of one zstd frame a plane at level 1 where nothing else is said. With
``--cache`` the scored signals are kept in a folder, and taken from there the next time. The
comparison with pcodec needs ``pip install pcodec``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from benchmarks.figures import machine, print_figure
from benchmarks.rate_files import Files, dictionaries, pcodec, row_groups, zstd_levels
from benchmarks.rate_ids import bounds, id_orders, order_sources, runs_and_planes
from benchmarks.rate_values import inclusion, pairs, pps_grids, topk_grids
from benchmarks.scored import QUICK_POSITIONS, Scored, Text, read_texts, score
from benchmarks.streams import Row


def scored_of(teacher: str, texts: Path, *, positions: int | None, cache: Path | None) -> Scored:
    """The signals of all selections, from the cache where they are in it.

    The cache is a pickle, for a folder that only its user writes to.
    """
    file = cache and cache / f"scored-{positions or 'all'}.pkl"
    if file and file.exists():
        found = pickle.loads(file.read_bytes())
        assert isinstance(found, Scored)
        return found
    scored = score(teacher, read_texts(teacher, texts, positions=positions))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(scored))
    return scored


def variants(
    scored: Scored, teacher: str, uncut: list[Text]
) -> dict[str, Callable[[], Iterator[Row]]]:
    """What there is to measure, by name."""
    order = scored.order()
    files = Files(scored, order)
    return {
        "runs": lambda: runs_and_planes(scored, order),
        "orders": lambda: id_orders(scored),
        "order_sources": lambda: order_sources(scored, uncut),
        "bounds": lambda: bounds(scored, order),
        "topk_grids": lambda: topk_grids(scored),
        "pps_grids": lambda: pps_grids(scored),
        "pairs": lambda: pairs(scored),
        "inclusion": lambda: inclusion(scored, teacher, bytes_per_id=files.bytes_per_tail_id),
        "levels": lambda: zstd_levels(files),
        "row_groups": lambda: row_groups(files),
        "dictionaries": lambda: dictionaries(files),
        "pcodec": lambda: pcodec(files),
    }


@click.command()
@click.option("--teacher", required=True, help="Folder of a causal language model.")
@click.option("--texts", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--positions", type=int, help="About so many instead of those of all texts.")
@click.option("--quick", is_flag=True, help=f"{QUICK_POSITIONS:,} positions.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for the scored signals.")
@click.option("--only", multiple=True, help="Only these: runs, orders, bounds, …")
def main(
    teacher: str,
    texts: Path,
    positions: int,
    quick: bool,
    cache: Path | None,
    only: tuple[str, ...],
) -> None:
    """Print a JSON line for each figure of each variant."""
    positions = QUICK_POSITIONS if quick else positions
    scored = scored_of(teacher, texts, positions=positions, cache=cache)
    about = {"positions": len(scored.squares_S), "machine": machine()}
    uncut = read_texts(teacher, texts, positions=None, max_length=None)
    for group, measured in variants(scored, teacher, uncut).items():
        if only and group not in only:
            continue
        for name, figures in measured():
            for figure, value in figures.items():
                unit = _unit(figure)
                print_figure(f"rate.variant.{name}.{figure}", value, unit, **about)


def _unit(figure: str) -> str:
    units = {
        "above_15": "codes per position",
        "kl": "nats",
        "rounding_share": "of the selection's variance",
        "positions_per_group": "positions",
        "tokens": "tokens",
        "dictionaries": "bytes",
    }
    if figure.startswith(("variance", "relative")):
        return "sum over tokens per position"
    if figure.endswith("_ns"):
        return "ns of compressing per position"
    return units.get(figure, "bytes per position")


if __name__ == "__main__":
    main()
