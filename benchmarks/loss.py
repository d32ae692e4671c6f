"""Time and memory of losses from hidden states: ours, fused, against other ways to write them.

Forward and backward of the output layer and the loss, gradients for hidden states and weight.
Times are medians over rounds in which all methods take turns, and ratios are medians of the rounds'
ratios. Peak memory is measured in a fresh process for each method and is what is needed beside
hidden states and weight. Liger's losses join where ``liger-kernel`` is installed; its Triton
kernels need CUDA.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import machine, print_failure, print_figure
from benchmarks.loss_methods import METHODS, Inputs, Setting, run_once

ROOT = Path(__file__).parents[1]
YARDSTICK, OURS = "ce_chunked", "fused_kl_pps"
VOCABS = (32_768, 131_072, 262_144)
MEGABYTE = 1e6


def main() -> None:
    """Run the comparison and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller, one vocabulary")
    parser.add_argument("--ratios", action="store_true", help="only ours over its yardsticks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    dtype = "bfloat16" if cuda else "float32"
    target = Setting(8192 if cuda else 2048, 151_936, dtype=dtype, device=options.device)
    if options.quick:
        target = replace(target, tokens=1024, hidden=256)
    print_ratios(target, rounds=5)
    if not options.ratios:
        methods = available(options.device)
        compare(target, methods, rounds=2 if options.quick else 3)
        if not options.quick:
            compare_others(replace(target, tokens=8192 if cuda else 512), methods)


def compare_others(setting: Setting, methods: list[str]) -> None:
    """The same for other vocabularies, numbers of entries and dtypes."""
    other = "float32" if setting.dtype == "bfloat16" else "bfloat16"
    for vocab in VOCABS:
        compare(replace(setting, vocab=vocab), methods, rounds=3)
    for k in (12, 300):
        compare(replace(setting, k=k), methods, rounds=3)
    compare(replace(setting, dtype=other), methods, rounds=3)


def available(device: str) -> list[str]:
    """The methods that can run here; a figure without a value for each that cannot."""
    found = []
    for name in METHODS:
        missing = name.startswith("liger") and importlib.util.find_spec("liger_kernel") is None
        if missing:
            print_failure(f"loss.{name}", "not measured: pip install liger-kernel")
        elif "triton" in name and device != "cuda":
            print_failure(f"loss.{name}", "not measured: needs CUDA")
        else:
            found.append(name)
    return found


def compare(setting: Setting, methods: list[str], *, rounds: int) -> None:
    """Time and memory of each method in one setting."""
    inputs = Inputs(setting)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name in methods:
            seconds[name].append(run_once(name, inputs))
    more = {**asdict(setting), "chunk_tokens": setting.chunk_tokens, "machine": place(setting)}
    for name in methods:
        ratios = [a / b for a, b in zip(seconds[name], seconds[YARDSTICK], strict=True)]
        median = statistics.median(seconds[name])
        print_figure(f"loss.{name}.seconds", round(median, 4), "s", **more)
        print_figure(
            f"loss.{name}.time_over_ce", round(statistics.median(ratios), 3), "ratio", **more
        )
        megabytes = peak(name, setting) / MEGABYTE
        print_figure(f"loss.{name}.megabytes", round(megabytes, 1), "MB", **more)


def print_ratios(setting: Setting, *, rounds: int) -> None:
    """Our loss over its yardsticks, in turns."""
    inputs = Inputs(setting)
    ratios = []
    for _ in range(rounds):
        yardstick = run_once(YARDSTICK, inputs)
        ratios.append(run_once(OURS, inputs) / yardstick)
    more = {**asdict(setting), "rounds": rounds, "machine": place(setting)}
    del inputs
    print_figure("loss.fused.time_over_ce", round(statistics.median(ratios), 3), "ratio", **more)
    ours = peak(OURS, setting)
    for figure, other in (("memory_over_ce", YARDSTICK), ("memory_over_dense", "kl_dense")):
        print_figure(f"loss.fused.{figure}", round(ours / peak(other, setting), 3), "ratio", **more)


def peak(method: str, setting: Setting) -> int:
    """Peak bytes of a method, of a process of its own."""
    program = [sys.executable, "-m", "benchmarks.loss_methods", method]
    done = subprocess.run(
        [*program, "--setting", json.dumps(asdict(setting))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return int(answer["peak_bytes"])


def place(setting: Setting) -> str:
    """Where it ran."""
    return torch.cuda.get_device_name() if setting.device == "cuda" else machine()


if __name__ == "__main__":
    main()
