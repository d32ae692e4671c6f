"""The vllm teacher on two pipeline stages of two tensor-parallel ranks each."""

from __future__ import annotations

import pytest

from kdstore.audit import AUDIT_SELECTION
from kdstore.errors import TeacherError
from kdstore.teachers.vllm.packing import unpack
from tests.teachers.vllm.conftest import ENGINE, running, some_samples
from tests.teachers.vllm.helpers import IGNORED_WARNINGS, assert_agree, on_ranks, scores

pytestmark = IGNORED_WARNINGS
ANSWERING = 2  # the rank that does: the first of the last stage


@pytest.fixture(scope="module")
def teacher(teacher_options):
    """Eager engines on CPUs skip the warm-up, in which later stages make room for input."""
    parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}

    def warm_up(worker):
        worker.model_runner.profile_run()

    with running(teacher_options(vllm=ENGINE | parallel)) as teacher:
        on_ranks(teacher, warm_up)
        yield teacher


@pytest.mark.parametrize(
    ("selection", "least"), [("topk:k=20", 0.999), ("pps:tau=0.02", 0.99), ("counts:n=20", 0.98)]
)
def test_answers_are_those_of_transformers(teacher, hf_teacher, selection, least):
    assert_agree(teacher, hf_teacher, some_samples(), selection, least=least)


def test_ranks_stay_in_step_through_a_head_of_many_chunks(teacher, hf_teacher):
    def few_rows(worker):
        from kdstore.teachers.vllm import tap

        tap.head_rows = lambda *_: 7

    def restored(worker):
        from kdstore.select.driver import head_rows
        from kdstore.teachers.vllm import tap

        tap.head_rows = head_rows

    on_ranks(teacher, few_rows)
    assert_agree(teacher, hf_teacher, some_samples(), "pps:tau=0.02", least=0.99)
    on_ranks(teacher, restored)


def test_topk_alone_gathers_no_logits(teacher, hf_teacher):
    """Nor does it select from them: the head that does is never asked."""

    def watch(worker):
        tap = worker.kdstore_tap
        head, tap.rows = tap._head, 0

        def counted(hidden):
            tap.rows += len(hidden)
            return head(hidden)

        tap._head = counted
        return tap._shard is not None

    def rows(worker):
        return worker.kdstore_tap.rows

    samples = some_samples()
    assert on_ranks(teacher, watch) == [False, False, True, True]
    assert_agree(teacher, hf_teacher, samples, "topk:k=50", least=0.999, audit_fraction=0)
    assert on_ranks(teacher, rows) == [0] * 4
    assert_agree(teacher, hf_teacher, samples, "topk:k=50", least=0.999)
    count = sum(sample.num_scored for sample in samples)
    assert on_ranks(teacher, rows) == [0, 0, count, count]


def test_one_rank_answers(teacher, monkeypatch):
    blobs = []
    rpc = teacher._engine.collective_rpc

    def watched(*args, **kwargs):
        blobs.extend(rpc(*args, **kwargs))
        return blobs

    monkeypatch.setattr(teacher._engine, "collective_rpc", watched)
    samples = some_samples()[20:24]
    scores(teacher, samples, "topk:k=5")
    found = [unpack(blob, selection="topk:k=5", audit=AUDIT_SELECTION) for blob in blobs]
    answered = [sum(len(one.positions_S) for one in answers) for answers, _ in found]
    assert answered == [0, 0, sum(sample.num_scored for sample in samples), 0]


def test_an_error_of_one_rank_reaches_the_caller_and_the_engine_lives(teacher):
    def other_width(worker):
        if worker.rank == ANSWERING:
            worker.kdstore_tap._vocab_size -= 64

    def right_width(worker):
        if worker.rank == ANSWERING:
            worker.kdstore_tap._vocab_size += 64

    samples = some_samples()[20:24]
    on_ranks(teacher, other_width)
    with pytest.raises(TeacherError, match="vocab_size 320"):
        scores(teacher, samples, "topk:k=5", audit_fraction=0.5)
    on_ranks(teacher, right_width)
    assert len(scores(teacher, samples, "topk:k=5", audit_fraction=0.5)) == 4


def test_provenance(teacher):
    assert teacher.provenance()["parallel"] == [2, 2]
