"""What a finished run leaves beside its student: figures, their history, and curves."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdstore.errors import MissingDependencyError
from kdstore.train.curves import History, lines_of, save_curves

if TYPE_CHECKING:
    from kdstore.train.config import TrainConfig
    from kdstore.train.watch import TrainingWatch

METRICS_FILE = "metrics.json"
HISTORY_FILE = "history.jsonl"
CURVES_FILE = "curves.png"


def measure(config: TrainConfig, watch: TrainingWatch, history: History) -> dict[str, Any]:
    """Tokens, time and speed of this session; first and last value logged of each loss."""
    lines = lines_of(history, ["loss", *config.losses])
    return {
        "train_tokens": watch.tokens,
        "train_seconds": round(watch.seconds, 3),
        "tokens_per_second": round(watch.tokens / max(watch.seconds, 1e-9), 1),
        "losses": {name: [values[0], values[-1]] for name, (_, values) in lines.items()},
        "student": str(config.output_dir),
    }


def write_results(
    config: TrainConfig, metrics: Mapping[str, Any], history: History, *, quiet: bool
) -> dict[str, Any]:
    """Writes ``history.jsonl``, ``curves.png`` and ``metrics.json``; the metrics, with ``curves``.

    Without matplotlib there are no curves, which one line says. They never fail a run.
    """
    folder = config.output_dir
    lines = [json.dumps(entry) + "\n" for entry in history]
    (folder / HISTORY_FILE).write_text("".join(lines))
    curves = _try_curves(folder / CURVES_FILE, config, history, quiet=quiet)
    found = {**metrics, "curves": curves}
    text = json.dumps(found, indent=2, sort_keys=True)
    (folder / METRICS_FILE).write_text(text + "\n")
    return found


def _try_curves(path: Path, config: TrainConfig, history: History, *, quiet: bool) -> str | None:
    """The path of the curves, or None where they cannot be drawn; hours of training are done."""
    try:
        save_curves(history, path, losses=list(config.losses))
        return str(path)
    except MissingDependencyError:
        reason = "matplotlib is missing: pip install kdstore[report]"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if not quiet:
        print(f"kdstore: no {path.name}: {reason}", file=sys.stderr)
    return None
