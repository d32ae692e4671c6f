"""The vllm teacher on a real engine, against transformers on the same text."""

from __future__ import annotations

import numpy as np
import pytest

from kdstore.errors import TeacherError
from kdstore.sample import Sample
from kdstore.select import parse_selection
from kdstore.teachers.backends import open_backend
from kdstore.teachers.vllm.answers import LogprobAnswers
from kdstore.teachers.vllm.teacher import VLLMTeacher
from tests.teachers.vllm.conftest import MAX_LENGTH, NUM_IDS, some_samples
from tests.teachers.vllm.helpers import (
    IGNORED_WARNINGS,
    assert_agree,
    count_preemptions,
    joined,
    same_ids,
    scores,
)

pytestmark = IGNORED_WARNINGS


@pytest.mark.parametrize(
    ("selection", "least"), [("topk:k=20", 0.999), ("pps:tau=0.02", 0.99), ("counts:n=20", 0.98)]
)
def test_answers_are_those_of_transformers(vllm_teacher, hf_teacher, selection, least):
    """Chunked prefill, shared prefixes, every length, samples that lose their place."""
    preempted = count_preemptions(vllm_teacher)
    assert_agree(vllm_teacher, hf_teacher, some_samples(), selection, least=least)
    assert preempted()[0] > 20


def test_the_entries_of_topk(vllm_teacher, hf_teacher):
    """Entry by entry: 99.9 % of the ids, and every value of those."""
    samples = some_samples()
    found = joined(scores(vllm_teacher, samples, "topk:k=50"), samples)
    expected = joined(scores(hf_teacher, samples, "topk:k=50"), samples)
    a, b = (s.ids_N.reshape(-1, 50) for s in (found, expected))
    assert np.mean([len(np.intersect1d(x, y)) / 50 for x, y in zip(a, b, strict=True)]) >= 0.999
    same = a == b
    np.testing.assert_allclose(
        found.logprobs_N.reshape(-1, 50)[same],
        expected.logprobs_N.reshape(-1, 50)[same],
        atol=1e-3,
    )
    np.testing.assert_allclose(found.rest_S, expected.rest_S, atol=1e-3)


def test_shared_prefixes_are_read_from_the_cache(vllm_teacher, monkeypatch):
    """And a sample whose scored positions it swallowed is asked again, without it."""
    outputs = []
    step = vllm_teacher._engine.step

    def watched():
        found = step()
        outputs.extend(found)
        return found

    monkeypatch.setattr(vllm_teacher._engine, "step", watched)
    generator = np.random.default_rng(1)
    ids = generator.integers(3, NUM_IDS, 250).astype(np.int32)
    first = Sample("whole", ids, runs=((1, 250),))
    list(scores(vllm_teacher, [first], "topk:k=5"))
    assert outputs.pop().num_cached_tokens == 0
    tail = Sample("tail", ids, runs=((230, 250),))
    middle = Sample("middle", ids, runs=((20, 250),))
    found = scores(vllm_teacher, [tail, middle], "topk:k=5")
    cached = [output.num_cached_tokens for output in outputs if output.finished]
    assert len(cached) == 3
    assert sorted(count > 0 for count in cached) == [False, True, True]
    whole = scores(vllm_teacher, [first], "topk:k=5")["whole"].signal
    for sample, rows in ((tail, slice(229, None)), (middle, slice(19, None))):
        signal = found[sample.sample_id].signal
        np.testing.assert_array_equal(signal.ids_N, whole[rows].ids_N)
        np.testing.assert_allclose(signal.logprobs_N, whole[rows].logprobs_N, atol=1e-4)


def test_a_draw_depends_on_seed_and_draw_alone(vllm_teacher):
    samples = some_samples()[100:120]
    first = joined(scores(vllm_teacher, samples, "pps:tau=0.05"), samples)
    again = joined(scores(vllm_teacher, samples[::-1], "pps:tau=0.05"), samples)
    other = joined(scores(vllm_teacher, samples, "pps:tau=0.05", draw=1), samples)
    assert same_ids(first, again) >= 0.99
    assert same_ids(first, other) < 0.1


def test_without_the_tap_topk_comes_from_flat_logprobs(vllm_teacher, teacher_options):
    info, engine = vllm_teacher.info, vllm_teacher._engine
    stock = VLLMTeacher(info, engine, LogprobAnswers(k=20), num_ids=info.vocab_size)
    hf_teacher = open_backend(teacher_options(backend="hf", vllm={})).load(num_ids=info.vocab_size)
    samples, scalars = some_samples()[::8], ("label_logprob", "label_rank")
    ours = joined(scores(stock, samples, "topk:k=20", scalars=scalars), samples)
    theirs = joined(scores(hf_teacher, samples, "topk:k=20", scalars=scalars), samples)
    assert same_ids(ours, theirs) >= 0.999
    np.testing.assert_allclose(ours.rest_S, theirs.rest_S, atol=1e-3)
    found, expected = ours.scalars, theirs.scalars
    np.testing.assert_allclose(found["label_logprob"], expected["label_logprob"], atol=1e-3)
    assert np.mean(found["label_rank"] == expected["label_rank"]) >= 0.998


def test_without_the_tap_padding_is_no_entry(vllm_teacher):
    info, engine = vllm_teacher.info, vllm_teacher._engine
    stock = VLLMTeacher(info, engine, LogprobAnswers(k=60), num_ids=NUM_IDS)
    samples = some_samples()[20:24]
    found = joined(scores(stock, samples, "topk:k=60", scalars=("label_logprob",)), samples)
    assert found.ids_N.max() < NUM_IDS
    assert found.entries_S.max() <= 60
    assert 0.05 < stock.provenance()["padding_mass"] < 0.5
    np.testing.assert_allclose(found.kept_mass_S + np.exp(found.rest_S), 1, atol=1e-5)


def test_an_error_in_a_worker_reaches_the_caller_and_the_engine_lives(vllm_teacher):
    bad = vllm_teacher._engine.collective_rpc("kdstore_install", args=(NUM_IDS,))
    assert bad == ["v1"]
    samples = some_samples()[20:24]
    with pytest.raises(TeacherError, match=f"vocab_size {NUM_IDS}"):
        scores(vllm_teacher, samples, "topk:k=5")
    vllm_teacher._engine.collective_rpc("kdstore_install", args=(vllm_teacher.vocab_size,))
    assert len(scores(vllm_teacher, samples, "topk:k=5")) == 4


def test_a_caller_may_stop_in_the_middle(vllm_teacher):
    samples = some_samples()
    for _ in vllm_teacher.score(samples, parse_selection("topk:k=5")):
        break
    assert len(scores(vllm_teacher, samples[50:60], "topk:k=5")) == 10


def test_too_long_a_sample_is_refused_by_name(vllm_teacher):
    ids = np.full(MAX_LENGTH + 1, 5, np.int32)
    with pytest.raises(TeacherError, match="sample 'long'"):
        scores(vllm_teacher, [Sample("long", ids, runs=((1, 5),))], "topk:k=5")


def test_provenance(vllm_teacher):
    import vllm

    vllm_teacher.provenance()
    scores(vllm_teacher, some_samples()[30:40], "topk:k=5")
    found = vllm_teacher.provenance()
    assert (found["backend"], found["runner"], found["device"]) == ("vllm", "v1", "cpu")
    assert found["vllm"] == vllm.__version__
    assert 0 < found["padding_mass"] < 1
    assert vllm_teacher.provenance()["padding_mass"] == 0
