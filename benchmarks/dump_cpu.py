"""CPU time a token of vLLM's ways to log-probabilities, outside forward, head and selection.

The engine runs in this process: as processes, its parts spin while they wait for each other, and
the time of one would be counted twice. From the process's CPU time goes that of plain prefill of
the same text, and what head and selection took: what is left is packing and Python objects. Of the
OpenAI server only the process that speaks HTTP is counted, and the client that parses its JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.dump_teachers import Size, save_teacher
from benchmarks.figures import machine, print_figure
from kdstore.sample import Sample
from kdstore.select.topk import TopK
from kdstore.teachers.hf_load import describe_checkpoint
from kdstore.teachers.vllm.answers import Asked, TapAnswers
from kdstore.teachers.vllm.engine import WORKER_EXTENSION
from kdstore.teachers.vllm.request import TapRule
from kdstore.teachers.vllm.teacher import VLLMTeacher

K = 64
LENGTH = 512
SCALARS = ("label_logprob", "label_rank", "entropy")
VOCAB = 32_000
PORT = 8765


def allow_calls() -> None:
    """Let ``collective_rpc`` take functions of this module, which engines of processes pickle."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def head_only(worker: Any, alone: bool) -> None:
    """In a worker: whether the tap runs the head and selects nothing."""
    tap = worker.kdstore_tap
    if alone:
        tap._selected = lambda *_: None
    else:
        del tap._selected


def watch(worker: Any) -> None:
    """In a worker: count the CPU time of the stock path's head and selection."""
    worker.spent = 0.0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                worker.spent += time.process_time() - began

        return run

    runner = worker.model_runner
    runner.model.compute_logits = counted(runner.model.compute_logits)
    runner.sampler.compute_logprobs = counted(runner.sampler.compute_logprobs)
    runner.sampler.gather_logprobs = counted(runner.sampler.gather_logprobs)


def spent(worker: Any) -> float:
    """In a worker: what was counted since it was last asked."""
    found, worker.spent = worker.spent, 0.0
    return float(found)


def drive(engine: Any, samples: Sequence[Sample], params: Callable[[Sample], Any]) -> list[Any]:
    """All samples through an engine; its outputs."""
    for sample in samples:
        prompt = {"type": "token", "prompt_token_ids": sample.input_ids_T.tolist()}
        engine.add_request(f"{time.perf_counter_ns()}", prompt, params(sample))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += [output for output in engine.step() if output.finished]
    return outputs


def tap_rule(selection: str) -> TapRule:
    """A rule of this selection and the usual scalars."""
    return TapRule(
        selection=selection, scalars=SCALARS, seed=0, draw=0, audit_fraction=0.0, num_ids=VOCAB
    )


def tap_params(selection: str) -> Callable[[Sample], Any]:
    """What the vllm teacher asks for a sample, answers left in the worker."""
    rule = tap_rule(selection)
    return lambda sample: TapAnswers.params(Asked(time.perf_counter_ns(), sample, fresh=True), rule)


class Meter:
    """An engine with and without the tap, and the text that it reads."""

    def __init__(self, folder: Path, *, samples: int) -> None:
        from vllm import EngineArgs, LLMEngine

        generator = np.random.default_rng(0)
        ids = generator.integers(3, VOCAB, (samples, LENGTH)).astype(np.int32)
        runs = ((1, LENGTH),)
        self.samples = [Sample(f"s{n}", row, runs=runs) for n, row in enumerate(ids)]
        args = EngineArgs(
            model=str(folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=LENGTH + 1,
            max_num_batched_tokens=2048,
            max_num_seqs=64,
            max_logprobs=K,
            disable_log_stats=True,
            worker_extension_cls=WORKER_EXTENSION,
            distributed_executor_backend="uni",
        )
        os.environ |= {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self.engine = LLMEngine.from_engine_args(args)
        info = describe_checkpoint(folder, device="cpu")
        answers = TapAnswers(self.engine, vocab_size=info.vocab_size)
        self.tap = VLLMTeacher(info, self.engine, answers, num_ids=VOCAB)
        self.engine.collective_rpc(watch)

    def plain(self) -> float:
        """Prefill of all samples: 0 seconds of head and selection that need be told apart."""
        drive(self.engine, self.samples, lambda _: _params())
        return self._watched()

    def tapped(self) -> float:
        """The teacher's whole way to signals; seconds of the tap's head and selection."""
        tallies = []
        for _ in self.tap.score(self.samples, TopK(k=K), scalars=SCALARS):
            tallies.append(self.tap._answers.tally)
        self._watched()
        inner = {id(tally): tally.head_s + tally.select_s for tally in tallies}
        return sum(inner.values())

    def stock(self, **how: Any) -> float:
        """vLLM's prompt log-probabilities; seconds of its head and selection."""
        drive(self.engine, self.samples, lambda _: _params(prompt_logprobs=K, **how))
        return self._watched()

    def _watched(self) -> float:
        return float(self.engine.collective_rpc(spent)[0])


def _params(**how: Any) -> Any:
    from vllm import SamplingParams

    settings = {"detokenize": False, "skip_reading_prefix_cache": True} | how
    return SamplingParams(max_tokens=1, temperature=0.0, **settings)


def outside(tasks: dict[str, Callable[[], float]], *, tokens: int) -> dict[str, float]:
    """Microseconds a token of each task, less head and selection, less those of the first task."""
    found = {}
    for name, task in tasks.items():
        began = time.process_time()
        inner = task()
        found[name] = (time.process_time() - began - inner) / tokens * 1e6
    first = next(iter(tasks))
    return {name: value - found[first] for name, value in found.items() if name != first}


def compare(folder: Path, *, quick: bool) -> None:
    """Print microseconds a token of each way, and their ratios to the tap's."""
    teacher = save_teacher(folder / "small", Size(128, 1, VOCAB), max_length=LENGTH)
    meter = Meter(teacher, samples=16 if quick else 64)
    tokens = len(meter.samples) * LENGTH
    tasks = {
        "plain": meter.plain,
        "tap": meter.tapped,
        "stock": lambda: meter.stock(detokenize=True),
        "stock_ids": meter.stock,
        "flat": lambda: meter.stock(flat_logprobs=True),
    }
    outside(tasks, tokens=tokens)  # first uses of everything
    rounds = [outside(tasks, tokens=tokens) for _ in range(1 if quick else 5)]
    meter.tap.close()
    context = {"k": K, "tokens": tokens, "rounds": len(rounds), "machine": machine()}
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    json_us = server_cost(teacher, meter.samples[: 4 if quick else 16])
    for name, value in {**median, "json": json_us}.items():
        print_figure(f"dump.vllm.cpu_us.{name}", value, "us/token", **context)
    for name in ("stock", "stock_ids", "flat"):
        ratio = statistics.median(one[name] / one["tap"] for one in rounds)
        print_figure(f"dump.vllm.cpu_ratio_{name}", ratio, "ratio", **context)
    print_figure("dump.vllm.cpu_ratio_json", json_us / median["tap"], "ratio", **context)


def server_cost(teacher: Path, samples: Sequence[Sample]) -> float:
    """Microseconds a token of prompt log-probabilities by HTTP, over a request without them."""
    with _server(teacher) as (url, server):
        costs = {}
        for k in (0, K):
            _ask(url, samples[:1], k)
            began = _cpu_of(server) + time.process_time()
            _ask(url, samples, k)
            costs[k] = _cpu_of(server) + time.process_time() - began
    return (costs[K] - costs[0]) / (len(samples) * LENGTH) * 1e6


def _cpu_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _ask(url: str, samples: Sequence[Sample], k: int) -> None:
    for sample in samples:
        body = {"prompt": sample.input_ids_T.tolist(), "max_tokens": 1, "temperature": 0}
        body |= {"prompt_logprobs": k} if k else {}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            json.load(answer)


@contextmanager
def _server(teacher: Path) -> Iterator[tuple[str, psutil.Process]]:
    url = f"http://127.0.0.1:{PORT}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(teacher)]
    command += ["--host", "127.0.0.1", "--port", str(PORT), "--enforce-eager", "--dtype", "float32"]
    command += ["--max-logprobs", str(K), "--max-model-len", str(LENGTH + 1)]
    command += ["--no-enable-prefix-caching"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            _wait_for(url, process)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            return
        except OSError:
            if process.poll() is not None:
                raise SystemExit("the server did not start") from None
            time.sleep(1)
    raise SystemExit("the server did not start in 5 minutes")
