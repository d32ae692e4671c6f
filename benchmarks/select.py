"""How fast selections are: positions a second, and their time against a fixed yardstick.

The yardstick is one float32 log-softmax and one float64 cumulative sum of the same number of
logits, in memory allocated once. Both are timed in turns, so that a busy machine slows both;
figures are medians over the rounds, ratios those of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.figures import machine, print_figure
from kdstore.hashing import RowKeys
from kdstore.select import parse_selection, select
from kdstore.select.driver import rows_per_chunk

SPECS = ("pps:tau=0.06", "counts:n=50", "topk:k=50", "topp:p=0.95")
VOCAB_SIZES = (32_768, 151_936)


def zipf_logits(positions: int, vocab_size: int, device: torch.device) -> Tensor:
    """[S, V] logits as a language model's: p falls as a power, from 1.0 to 2.6, of a token's rank.

    In float32 on a CPU and bfloat16 elsewhere, as the ``hf`` teacher gives them.
    """
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    powers = 1 + 1.6 * torch.rand(positions, 1, **options)
    log_rank = torch.arange(1, vocab_size + 1, device=device).log()
    logits: Tensor = torch.randn(positions, vocab_size, **options).mul_(0.5).sub_(powers * log_rank)
    logits = logits[:, torch.randperm(vocab_size, **options)]
    return logits if device.type == "cpu" else logits.bfloat16()


def yardstick(positions: int, vocab_size: int, device: torch.device) -> Callable[[], None]:
    """Both passes over as many positions, a chunk at a time, as selections make theirs."""
    rows = min(positions, rows_per_chunk(vocab_size, device))
    logits = torch.randn(rows, vocab_size, device=device)
    p = logits.double().softmax(-1)
    logp, sums = torch.empty_like(logits), torch.empty_like(p)

    def passes() -> None:
        for start in range(0, positions, rows):
            part = slice(0, min(rows, positions - start))
            torch.log_softmax(logits[part], -1, out=logp[part])
            torch.cumsum(p[part], -1, out=sums[part])

    return passes


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue drained."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(spec: str, logits: Tensor, *, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds a position of the selection and of the yardstick, round by round."""
    positions, vocab_size = logits.shape
    device, labels = logits.device, torch.zeros(positions, dtype=torch.long, device=logits.device)
    keys = RowKeys.of_samples([("sample", np.arange(1, positions + 1))], seed=0)
    rule = parse_selection(spec)
    passes = yardstick(positions, vocab_size, device)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        taken = seconds(lambda: select(logits, labels, selection=rule, keys=keys), device)
        times[0].append(taken / positions)
        times[1].append(seconds(passes, device) / positions)
    return times[0][1:], times[1][1:]  # the first round warms up


def main() -> None:
    """Measure every selection at every vocabulary size and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the logits, 5 rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    device = torch.device(options.device)
    elements = (1 << 24 if device.type == "cpu" else 1 << 28) // (4 if options.quick else 1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    context = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": name}
    for vocab_size in VOCAB_SIZES:
        logits = zipf_logits(elements // vocab_size, vocab_size, device)
        for spec in SPECS:
            ours, theirs = measure(spec, logits, rounds=5 if options.quick else 25)
            figure = f"select.{spec.partition(':')[0].replace('topk', 'topk50')}"
            context |= {"selection": spec, "positions": len(logits), "rounds": len(ours)}
            speed = float(1 / np.median(ours))
            ratio = float(np.median(np.divide(ours, theirs)))
            print_figure(f"{figure}.positions_per_s.{vocab_size}", speed, "positions/s", **context)
            print_figure(f"{figure}.yardsticks.{vocab_size}", ratio, "yardsticks", **context)


if __name__ == "__main__":
    main()
