"""What a dump costs beside the teacher's own work, and beside vLLM's other ways to the same.

``hf``: tokens a second of a dump over those of the bare forward with its head, on its batches.
``vllm``: of a dump over plain prefill with the head on the scored rows, and over plain prefill.
``cpu``: microseconds of CPU a token outside forward, head and selection: the tap next to vLLM's
prompt log-probabilities (dictionaries, flat) and to JSON from its OpenAI server.

Whole runs in turns; the figures are of the round with the median ratio. Teachers are random, and
for throughput so large that the forward takes most of the time, as a real one's does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import dump_cpu
from benchmarks.dump_teachers import Size, save_rows, save_teacher
from benchmarks.figures import machine, print_figure
from kdstore.filesystem import Folder
from kdstore.teachers.hf import HFTeacher, length_batches, padded_batch
from kdstore.teachers.scoring import Scoring, ScoringOptions
from kdstore.teachers.vllm.teacher import VLLMTeacher
from kdstore.writers.run import run_units

BATCH_TOKENS = 2048
MAX_LENGTH = 512
HEAD_ROWS = 1024


class Work:
    """A data set, and a teacher of one backend that is to dump it."""

    def __init__(self, folder: Path, data: Path, *, backend: str, select: str) -> None:
        options = ScoringOptions(
            path=str(folder),
            data=str(data),
            backend=backend,
            select=select,
            batch_tokens=BATCH_TOKENS,
            vllm={"max_num_seqs": 64, "seed": 0} if backend == "vllm" else {},
        )
        self.scoring = Scoring.of(options)
        vocab = self.scoring.backend.info.vocab_size  # its tokenizer is a smaller one's
        self.teacher: Any = self.scoring.backend.load(num_ids=vocab)
        self.samples = [sample for _, found in self.scoring.source.samples() for sample in found]

    def dump(self) -> None:
        """Plan, score, encode and commit into a new folder."""
        with tempfile.TemporaryDirectory(prefix="kdstore-") as folder:
            writer = self.scoring.open_store(Folder(f"{folder}/store"), quiet=True)
            planned = [writer.plan.unit(unit) for unit in writer.pending_units()]
            run_units(writer, self.teacher, self.scoring.source, planned, quiet=True)
            writer.seal()


@torch.inference_mode()
def bare_forward(work: Work) -> None:
    """The body, and the head on scored rows, of the batches that the dump makes."""
    split = work.teacher._split
    for batch in length_batches(work.samples, batch_tokens=BATCH_TOKENS):
        ids_BL, rows_S = padded_batch(batch)
        hidden = split.hidden(ids_BL).flatten(0, 1)[rows_S]
        for start in range(0, len(hidden), HEAD_ROWS):
            split.logits(hidden[start : start + HEAD_ROWS])


def prefill(work: Work) -> None:
    """Every sample through the engine, which generates one token and is asked nothing else."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, skip_reading_prefix_cache=True
    )
    dump_cpu.drive(work.teacher._engine, work.samples, lambda _: params)


def prefill_and_head(work: Work) -> None:
    """The same, with the tap running the head on scored rows, and no selection."""
    engine = work.teacher._engine
    engine.collective_rpc(dump_cpu.head_only, args=(True,))
    dump_cpu.drive(engine, work.samples, dump_cpu.tap_params(work.scoring.config.selection))
    engine.collective_rpc(dump_cpu.head_only, args=(False,))


def in_turns(work: Work, tasks: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of each task, of the round whose dump is the median of them over the first task."""
    for task in tasks.values():
        task()  # compiles kernels, touches memory
    seconds = []
    for _ in range(rounds):
        taken = {}
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            taken[name] = time.perf_counter() - began
        seconds.append(taken)
    first = next(iter(tasks))
    seconds.sort(key=lambda taken: taken[first] / taken["dump"])
    return seconds[len(seconds) // 2]


def compare_hf(folder: Path, data: Path, *, select: str, rounds: int) -> None:
    """Print the dump's speed over the bare forward's."""
    work = Work(folder, data, backend="hf", select=select)
    assert isinstance(work.teacher, HFTeacher)
    seconds = in_turns(work, {"forward": lambda: bare_forward(work), "dump": work.dump}, rounds)
    tokens = sum(sample.num_tokens for sample in work.samples)
    context = {"selection": select, "tokens": tokens, "rounds": rounds, **_context()}
    print_figure("dump.hf.tokens_per_s", tokens / seconds["dump"], "tokens/s", **context)
    print_figure("dump.hf.over_forward", seconds["forward"] / seconds["dump"], "ratio", **context)


def compare_vllm(folder: Path, data: Path, *, select: str, rounds: int) -> None:
    """Print the dump's speed over that of prefill, with and without the head on scored rows."""
    work = Work(folder, data, backend="vllm", select=select)
    assert isinstance(work.teacher, VLLMTeacher)
    tasks = {
        "prefill_and_head": lambda: prefill_and_head(work),
        "prefill": lambda: prefill(work),
        "dump": work.dump,
    }
    seconds = in_turns(work, tasks, rounds)
    work.teacher.close()
    tokens = sum(sample.num_tokens for sample in work.samples)
    context = {"selection": select, "tokens": tokens, "rounds": rounds, **_context()}
    head = 1 - seconds["prefill"] / seconds["prefill_and_head"]
    print_figure("dump.vllm.tokens_per_s", tokens / seconds["dump"], "tokens/s", **context)
    print_figure("dump.vllm.head_share", head, "share", **context)
    for name, figure in (("prefill_and_head", "over_prefill"), ("prefill", "over_plain_prefill")):
        print_figure(f"dump.vllm.{figure}", seconds[name] / seconds["dump"], "ratio", **context)


def _context() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "machine": machine()}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller teachers, fewer rounds")
    parser.add_argument("--parts", default="hf,vllm,cpu")
    parser.add_argument("--select", default="pps:tau=0.02")
    options = parser.parse_args()
    parts, quick = options.parts.split(","), options.quick
    size = (
        Size(hidden=1024, layers=6, vocab=dump_cpu.VOCAB)
        if quick
        else Size(2048, 8, dump_cpu.VOCAB)
    )
    rounds = 1 if quick else 3
    dump_cpu.allow_calls()
    with tempfile.TemporaryDirectory(prefix="kdstore-") as name:
        data = save_rows(Path(name) / "rows.jsonl", rows=6 if quick else 12, length=MAX_LENGTH)
        if {"hf", "vllm"} & {*parts}:
            folder = save_teacher(Path(name) / "teacher", size, max_length=MAX_LENGTH)
        if "hf" in parts:
            compare_hf(folder, data, select=options.select, rounds=rounds)
        if "vllm" in parts:
            compare_vllm(folder, data, select=options.select, rounds=rounds)
        if "cpu" in parts:
            dump_cpu.compare(Path(name), quick=quick)


if __name__ == "__main__":
    main()
