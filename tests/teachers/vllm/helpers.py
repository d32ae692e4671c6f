"""Comparing signals of two teachers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kdstore.select import parse_selection
from kdstore.signal import SparseSignal
from kdstore.teacher import Score
from kdstore.teachers.vllm.teacher import VLLMTeacher

# Importing vLLM imports parts of torch that torch itself calls deprecated.
IGNORED_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def assert_same_signal(found: SparseSignal, expected: SparseSignal) -> None:
    """Equal in every array, bit for bit."""
    assert len(found) == len(expected)
    if not len(found):
        return
    for name in ("indptr", "ids_N", "logprobs_N", "rest_S", "counts_N", "tail_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert found.scalars.keys() == expected.scalars.keys()
    for name, values in found.scalars.items():
        np.testing.assert_array_equal(values, expected.scalars[name], name)


def same_ids(found: SparseSignal, expected: SparseSignal) -> float:
    """The share of positions whose entries have the same ids."""
    same = [
        np.array_equal(
            found.ids_N[found.indptr[row] : found.indptr[row + 1]],
            expected.ids_N[expected.indptr[row] : expected.indptr[row + 1]],
        )
        for row in range(len(found))
    ]
    return float(np.mean(same))


def scores(teacher, samples, selection, **options) -> dict[str, Score]:
    found = list(teacher.score(samples, parse_selection(selection), seed=3, **options))
    by_id = {score.sample_id: score for score in found}
    assert len(by_id) == len(found)
    return by_id


def joined(scores: dict[str, Score], samples) -> SparseSignal:
    return SparseSignal.concat([scores[s.sample_id].signal for s in samples if s.num_scored])


def assert_agree(teacher, reference, samples, selection, *, least, audit_fraction=0.1) -> None:
    """Scalars and audits within 1e-3; the ids of a share of at least ``least`` of the positions."""
    ours = scores(teacher, samples, selection, audit_fraction=audit_fraction)
    theirs = scores(reference, samples, selection, audit_fraction=audit_fraction)
    assert ours.keys() == theirs.keys() == {s.sample_id for s in samples if s.num_scored}
    found, expected = joined(ours, samples), joined(theirs, samples)
    assert len(found) == sum(sample.num_scored for sample in samples)
    for name in ("label_logprob", "entropy"):
        np.testing.assert_allclose(found.scalars[name], expected.scalars[name], atol=1e-3)
    assert np.mean(found.scalars["label_rank"] == expected.scalars["label_rank"]) >= 0.999
    assert same_ids(found, expected) >= least
    np.testing.assert_allclose(found.rest_S, expected.rest_S, atol=1e-3)
    if not audit_fraction:
        return
    audits = [SparseSignal.concat([s[name].audit for name in ours]) for s in (ours, theirs)]
    assert len(audits[0]) > 1000
    np.testing.assert_array_equal(audits[0].ids_N, audits[1].ids_N)
    np.testing.assert_allclose(audits[0].logprobs_N, audits[1].logprobs_N, atol=1e-3)


def on_ranks(teacher: VLLMTeacher, function: Callable[[Any], Any]) -> list[Any]:
    """What a function of a worker gives, on every rank of the engine."""
    return teacher._engine.collective_rpc(function)


def count_preemptions(teacher: VLLMTeacher) -> Callable[[], list[int]]:
    """What gives, by rank, how many requests the engine has preempted since."""

    def watch(worker):
        execute, worker.preempted = type(worker).execute_model, 0

        def counted(scheduler_output, *args, **kwargs):
            worker.preempted += len(scheduler_output.preempted_req_ids or ())
            return execute(worker, scheduler_output, *args, **kwargs)

        worker.execute_model = counted

    def preempted(worker):
        return worker.preempted

    on_ranks(teacher, watch)
    return lambda: on_ranks(teacher, preempted)
