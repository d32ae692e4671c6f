"""Samples, teachers and comparisons of the tests of the openai teacher."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.sample import Sample
from kdstore.select import parse_selection
from kdstore.signal import SparseSignal
from kdstore.teachers.backends import open_backend
from kdstore.teachers.hf import HFTeacher
from kdstore.teachers.hf_load import describe_checkpoint
from kdstore.teachers.openai import OpenAITeacher
from kdstore.teachers.openai_options import ServerOptions
from kdstore.teachers.scoring import ScoringOptions

V = 384
TOP5 = parse_selection("topk:k=5")
SERVER_FIELDS = {one.name for one in fields(ServerOptions)}


def options_of(url: str, folder: Path, **changes: Any) -> ScoringOptions:
    """Options of a dump; those of a server are told apart by their names."""
    own = {name: changes.pop(name) for name in [*changes] if name in SERVER_FIELDS}
    settings: dict[str, Any] = {"select": "topk:k=5", "backend": "openai", **changes}
    server = ServerOptions(url=url, **own)
    return ScoringOptions(path=str(folder), data="unused", server=server, **settings)


def teacher_of(url: str, folder: Path, *, num_ids: int = V, **changes: Any) -> OpenAITeacher:
    teacher = open_backend(options_of(url, folder, **changes)).load(num_ids=num_ids)
    assert isinstance(teacher, OpenAITeacher)
    return teacher


def some_samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    lengths = [5, 40, 17, 2, 99]
    runs = [((1, 5),), ((3, 9), (20, 40)), ((16, 17),), (), ((50, 99),)]
    samples = [
        Sample(f"s{i}", generator.integers(3, V - 1, n).astype(np.int32), runs=r)
        for i, (n, r) in enumerate(zip(lengths, runs, strict=True))
    ]
    samples[1].input_ids_T[25] = V - 1  # which SGLang reports as 0
    return samples


def one_sample() -> list[Sample]:
    return some_samples()[:1]


def signals(teacher: Any, samples: list[Sample], selection: Any = TOP5, **more: Any) -> Any:
    found: dict[str, SparseSignal] = {}
    for score in teacher.score(samples, selection, **more):
        assert (score.sample_id not in found, len(score.audit)) == (True, 0)
        found[score.sample_id] = score.signal
    return found


def hf_signals(
    folder: Path, samples: list[Sample], selection: Any = TOP5, *, num_ids: int = V
) -> dict[str, SparseSignal]:
    info = describe_checkpoint(folder, device="cpu")
    return signals(HFTeacher(info, device="cpu", num_ids=num_ids), samples, selection)


def assert_same(got: dict[str, SparseSignal], want: dict[str, SparseSignal]) -> None:
    assert set(got) == set(want)
    for name, signal in got.items():
        np.testing.assert_array_equal(signal.indptr, want[name].indptr)
        np.testing.assert_array_equal(signal.ids_N, want[name].ids_N)
        np.testing.assert_allclose(signal.logprobs_N, want[name].logprobs_N, atol=2e-5)
        np.testing.assert_allclose(np.exp(signal.rest_S), np.exp(want[name].rest_S), atol=2e-6)
        for scalar, values in signal.scalars.items():
            np.testing.assert_allclose(values, want[name].scalars[scalar], atol=2e-5)
