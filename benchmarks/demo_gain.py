"""What the stored signal is worth to the demo's student: paired runs over several seeds.

For each seed the same student, from the same initialisation and in the same order of batches, is
trained for the same steps on the text alone and on the stored signal. Printed are the held-out
losses, the paired differences' mean and standard deviation, and what the signal cost to store.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from kdstore_cli.dump import dump

import kdstore
from benchmarks.figures import machine, print_figure
from kdstore.readers.stats import store_stats
from kdstore.train.config import load_config
from kdstore.train.run import run_training

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny"
sys.path.insert(0, str(EXAMPLE))
from report import teacher_loss  # noqa: E402

LOSSES = {"ce": ("losses.forward_kl=0", "losses.ce=1"), "distilled": ()}


def dump_demo(folder: Path, selection: str) -> str:
    """The demo's store, made as scripts/demo makes it; its path."""
    out = str(folder / "store")
    options = ["--max-length", "512", "--add-bos", "always", "--select", selection, "--quiet"]
    text = str(EXAMPLE / "text" / "student.jsonl")
    teacher = str(EXAMPLE / "teacher")
    dump.main(["--teacher", teacher, "--data", text, "--out", out, *options], standalone_mode=False)
    return out


def held_out_loss(store: str, folder: Path, name: str, *, seed: int, steps: int) -> float:
    """Nats per held-out token of one student."""
    overrides = [
        *(f"store={store}", f"seed={seed}", f"training.max_steps={steps}"),
        *(f"training.output_dir={folder / f'{name}-{seed}'}", *LOSSES[name]),
    ]
    return float(
        run_training(load_config(EXAMPLE / "train.yaml", overrides), quiet=True)["eval_loss"]
    )


def main() -> None:
    """Run the pairs and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 seeds, 60 steps")
    parser.add_argument("--select", default="pps:tau=0.06")
    options = parser.parse_args()
    seeds, steps = (2, 60) if options.quick else (3, 200)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = dump_demo(folder, options.select)
        sizes = store_stats(kdstore.open(store))["bytes_per_position"]
        losses = {
            kind: [held_out_loss(store, folder, kind, seed=s, steps=steps) for s in range(seeds)]
            for kind in LOSSES
        }
        teacher = teacher_loss(kdstore.open(store))
    context = {"selection": options.select, "steps": steps, "seeds": seeds, "machine": machine()}
    for part in ("total", "signal", "scalars"):
        print_figure(f"demo.bytes_per_position.{part}", sizes[part], "bytes", **context)
    print_figure("demo.teacher.heldout_loss", teacher, "nats/token", machine=machine())
    for kind, values in losses.items():
        print_figure(
            f"demo.{kind}.heldout_loss",
            float(np.mean(values)),
            "nats/token",
            runs=values,
            **context,
        )
    gains = np.subtract(losses["ce"], losses["distilled"])
    print_figure(
        "demo.gain.mean", float(gains.mean()), "nats/token", runs=gains.tolist(), **context
    )
    print_figure("demo.gain.std", float(gains.std(ddof=1)), "nats/token", **context)


if __name__ == "__main__":
    main()
