"""The demo's table: what the store costs, and what the student gained by it.

Run after scripts/demo's other steps: reads the store and both students' metrics under build/demo,
and evaluates the teacher on the same held-out text.
"""

from __future__ import annotations

import json
from pathlib import Path

import kdstore
from kdstore.inputs import InputConfig
from kdstore.readers.stats import store_stats
from kdstore.teachers.hf_load import describe_checkpoint, load_model, load_tokenizer
from kdstore.train.config import load_config
from kdstore.train.evaluate import evaluate_model
from kdstore.train.heldout import read_held_out

EXAMPLE = Path(__file__).parent
BUILD = Path("build/demo")


def teacher_loss(store: kdstore.Store) -> float:
    """Nats per held-out token of the teacher, on the tokens that the students are evaluated on."""
    config = load_config(EXAMPLE / "train.yaml")
    assert config.eval is not None
    info = describe_checkpoint(EXAMPLE / "teacher", device="cpu")
    inputs = InputConfig.from_dict(store.header.identity["input"])
    teacher = load_model(info, device="cpu")
    held_out = read_held_out(config.eval, load_tokenizer(info.path), inputs, teacher)
    return float(evaluate_model(teacher, held_out)["loss"])


def main() -> None:
    """Print the table."""
    store = kdstore.open(BUILD / "store")
    stats = store_stats(store)
    losses = {
        "teacher": teacher_loss(store),
        "student, cross-entropy": json.loads((BUILD / "ce/metrics.json").read_text())["eval_loss"],
        "student, distilled": json.loads((BUILD / "distilled/metrics.json").read_text())[
            "eval_loss"
        ],
    }
    sizes = stats["bytes_per_position"]
    stored = sizes["total"] - sizes["audit"]
    print(f"\n{stats['num_scored']:,} positions stored at {stored:.1f} bytes each ", end="")
    print(f"({sizes['signal']:.1f} signal, {sizes['scalars']:.1f} scalars), the audit apart\n")
    print(f"{'held-out loss':24}  nats per token")
    for name, loss in losses.items():
        print(f"{name:24}  {loss:.3f}")
    gain = losses["student, cross-entropy"] - losses["student, distilled"]
    print(f"\nthe stored signal is worth {gain:.3f} nats per token to this student")


if __name__ == "__main__":
    main()
