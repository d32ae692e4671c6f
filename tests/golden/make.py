"""Makes golden stores, once: ``python -m tests.golden.make``. No test runs it.

What is there stays as it is, byte for byte: a store that exists is never written again. A new codec
or format version adds recipes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import kdstore
from kdstore.filesystem import Folder
from kdstore.layout import AUDIT_SIGNAL, MAIN_SIGNAL
from kdstore.sample import Sample
from kdstore.writers.overlay import OverlayWriter, add_scalar
from kdstore.writers.store import NewPlan, StoreWriter
from tests.golden.arrays import GOLDEN, OVERLAY, Arrays, describe, signal_arrays
from tests.golden.recipes import RECIPES, Recipe
from tests.golden.signals import reward, scored
from tests.golden.source import identity_of, plan_of, samples_of, tokenizer_of

ROWS_PER_GROUP = 3


class GoldenWriter(StoreWriter):
    """Writes small row groups, so that shards have several."""

    def row_groups(self, unit: int, samples: list[Sample]) -> list[list[Sample]]:  # type: ignore[override]
        return [samples[i : i + ROWS_PER_GROUP] for i in range(0, len(samples), ROWS_PER_GROUP)]


def make(recipe: Recipe, folder: Path) -> Arrays:
    """Write a store and its overlays; the arrays to keep beside it."""
    plain = samples_of(recipe)
    plan, order = plan_of(recipe, plain)
    files, identity = tokenizer_of(), identity_of(recipe)
    writer = GoldenWriter.open(
        Folder(folder),
        identity,
        make_plan=lambda: NewPlan(plan, order, {"rows": len(plain)}),
        tokenizer_files=files,
    )
    samples = scored(recipe, plain, draw=0)
    by_id = {sample.sample_id: sample for sample in samples}
    for unit in writer.pending_units():
        rows = [by_id[name] for name, _ in plan.unit(unit).ids_and_lengths]
        writer.commit(unit, rows, statistics={}, provenance={"made_by": "tests/golden/make.py"})
    if recipe.sealed:
        writer.seal()
    arrays = {"samples": describe(samples)}
    arrays |= signal_arrays(f"original/{MAIN_SIGNAL}", [s.signal for s in samples])  # type: ignore[misc]
    if recipe.audit_fraction:
        audits = [sample.audit.signal for sample in samples if sample.audit]
        arrays |= signal_arrays(f"original/{AUDIT_SIGNAL}", audits)  # type: ignore[arg-type]
    for name, draw in recipe.draws.items():
        arrays |= add_overlay(recipe, folder, name, draw=draw)
    for name, scalars in recipe.scalar_overlays.items():
        arrays |= add_overlay(recipe, folder, name, scalars=scalars)
    if recipe.reward:
        add_scalar(folder, "reward", reward)
    return arrays | decoded(folder)


def add_overlay(
    recipe: Recipe, folder: Path, name: str, *, draw: int = 0, scalars: tuple[str, ...] = ()
) -> Arrays:
    """Write an overlay of a draw or of scalars; its original signals."""
    store = kdstore.open(folder, overlays=())
    writer = OverlayWriter.open(store, name, draw=draw, scalars=scalars)
    samples = scored(recipe, list(store), draw=draw, scalars=scalars)
    for unit in writer.pending_units():
        rows = samples[store.first_rows[unit] : store.first_rows[unit + 1]]
        writer.commit(unit, rows, statistics={}, provenance={"made_by": "tests/golden/make.py"})
    writer.seal()
    return signal_arrays(f"original/{OVERLAY}{name}", [sample.signal for sample in samples])  # type: ignore[misc]


def decoded(folder: Path) -> Arrays:
    """What a read gives: each signal, each overlay alone."""
    store = kdstore.open(folder, overlays=())
    arrays: Arrays = {}
    for name in store.header.identity["signals"]:
        signals = [sample.signal for sample in store.with_signal(name)]
        arrays |= signal_arrays(f"decoded/{name}", signals)  # type: ignore[arg-type]
    for name, overlay in kdstore.open(folder).overlays.found.items():
        one = kdstore.open(folder, overlays=[name])
        samples = [one[index, overlay.header.draw] for index in range(len(one))]
        signals = [sample.signal for sample in samples]
        arrays |= signal_arrays(f"decoded/{OVERLAY}{name}", signals)  # type: ignore[arg-type]
    return arrays


def main() -> None:
    """Make each store that is not there yet."""
    for recipe in RECIPES:
        folder = GOLDEN / recipe.name
        if folder.exists():
            print(f"{recipe.name}: is there, and stays")
            continue
        with tempfile.TemporaryDirectory(dir=GOLDEN) as temporary:
            made = Path(temporary) / recipe.name
            arrays = make(recipe, made)
            np.savez_compressed(GOLDEN / f"{recipe.name}.npz", **arrays)
            made.rename(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(
            f"{recipe.name}: {size} bytes, {(GOLDEN / f'{recipe.name}.npz').stat().st_size} beside"
        )


if __name__ == "__main__":
    main()
