"""One engine for all tests that can share it: starting one takes half a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdstore.sample import Sample
from kdstore.teacher import Teacher
from kdstore.teachers.backends import open_backend
from kdstore.teachers.scoring import ScoringOptions
from kdstore.teachers.vllm.teacher import VLLMTeacher

NUM_IDS = 320
MAX_LENGTH = 256
ENGINE = {  # 8 samples at once in steps of 32 tokens each, and memory for 3 of the longest
    "max_num_seqs": 64,
    "block_size": 32,
    "num_gpu_blocks_override": 25,
    "long_prefill_token_threshold": 32,
    "scheduler_reserve_full_isl": False,
    "max_logprobs": 64,
}


def some_samples() -> list[Sample]:
    """Every length from 1 to the longest; a third share a prefix that is not scored."""
    generator = np.random.default_rng(0)
    prefix = generator.integers(3, NUM_IDS, 140)
    samples = []
    for length in range(1, MAX_LENGTH + 1):
        ids = generator.integers(3, NUM_IDS, length)
        first = 1
        if length > 150 and length % 3 == 0:
            ids[:140], first = prefix, 145
        runs = ((first, length),) if first < length else ()
        samples.append(Sample(f"s{length}", ids.astype(np.int32), runs=runs))
    return samples


@pytest.fixture(scope="session")
def teacher_options(vllm_teacher_dir: Path) -> Callable[..., ScoringOptions]:
    """Options of a small engine, whose steps have 256 tokens."""

    def options(**changes: Any) -> ScoringOptions:
        settings: dict[str, Any] = {
            "path": str(vllm_teacher_dir),
            "data": "not read",
            "batch_tokens": 256,
            "backend": "vllm",
            "vllm": ENGINE,
        }
        return ScoringOptions(**(settings | changes))

    return options


@pytest.fixture(scope="session")
def hf_teacher(teacher_options: Callable[..., ScoringOptions]) -> Teacher:
    """The same model, by transformers."""
    return open_backend(teacher_options(backend="hf", vllm={})).load(num_ids=NUM_IDS)


@contextmanager
def running(options: ScoringOptions) -> Iterator[VLLMTeacher]:
    """The teacher of an engine, for as long as it is needed; threads are not bound to cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for ``on_ranks``, at both ends
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        teacher = open_backend(options).load(num_ids=NUM_IDS)
        assert isinstance(teacher, VLLMTeacher)
        yield teacher
        teacher.close()


@pytest.fixture(scope="session")
def vllm_teacher(teacher_options: Callable[..., ScoringOptions]) -> Iterator[VLLMTeacher]:
    """The teacher of an engine with chunked prefill, prefix caching and preemptions."""
    with running(teacher_options()) as teacher:
        yield teacher


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share an engine run in one of pytest's processes."""
    for item in items:
        if "vllm_teacher" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("vllm"))
        elif item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
