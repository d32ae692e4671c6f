"""Curves of a run, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdstore.errors import MissingDependencyError

History = Sequence[Mapping[str, Any]]


def save_curves(history: History, path: Path, *, losses: Sequence[str]) -> None:
    """A PNG at ``path``: training losses, held-out loss and learning rate over the steps.

    ``history`` is a trainer's `state.log_history`; panels without a figure in it are left out.
    Raises MissingDependencyError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "curves need matplotlib", where=path, todo="pip install kdstore[report]"
        ) from error
    wanted = {
        "training loss, nats per scored token": ["loss", *losses],
        "held-out loss, nats per scored token": ["eval_loss"],
        "learning rate": ["learning_rate"],
    }
    lines = {title: lines_of(history, names) for title, names in wanted.items()}
    drawn = {title: found for title, found in lines.items() if found} or {"no step was logged": {}}
    figure = Figure(figsize=(8, 3 * len(drawn)), layout="constrained")
    all_axes = figure.subplots(len(drawn), sharex=True, squeeze=False)[:, 0]
    for axes, (title, found) in zip(all_axes, drawn.items(), strict=True):
        for name, (steps, values) in found.items():
            axes.plot(steps, values, label=name, marker="." if len(steps) < 50 else "")
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(alpha=0.3)
        if len(found) > 1:
            axes.legend()
    all_axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120, format="png")


def lines_of(history: History, names: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> steps and values at them, of those names that were logged."""
    found = {
        name: [(entry["step"], float(entry[name])) for entry in history if name in entry]
        for name in names
    }
    return {
        name: ([step for step, _ in points], [value for _, value in points])
        for name, points in found.items()
        if points
    }
