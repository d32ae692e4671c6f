"""Completions of the vllm teacher, on the engine that scores them afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from kdstore.completion import Completion, Prompt, Sampling
from kdstore.errors import TeacherError
from kdstore.sample import Sample
from kdstore.select import parse_selection
from kdstore.teachers.backends import open_backend
from tests.teachers.vllm.conftest import MAX_LENGTH, NUM_IDS
from tests.teachers.vllm.helpers import IGNORED_WARNINGS

pytestmark = IGNORED_WARNINGS

STOPS = (1, 40)


@pytest.fixture(scope="module")
def hf_teacher(teacher_options):
    return open_backend(teacher_options(backend="hf", vllm={})).load(num_ids=NUM_IDS)


def some_prompts(count: int = 30, *, each: int = 3, room: int = 40) -> list[Prompt]:
    generator = np.random.default_rng(0)
    texts = [generator.integers(3, NUM_IDS, n) for n in generator.integers(1, 120, count)]
    return [
        Prompt(f"p{i}#{k}", ids.astype(np.int32), room)
        for i, ids in enumerate(texts)
        for k in range(each)
    ]


def completed(teacher, prompts, **options) -> dict[str, Completion]:
    groups = [prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]]
    found = list(teacher.generate(groups, Sampling(**{"stop_ids": STOPS, **options})))
    by_id = {completion.sample_id: completion for completion in found}
    assert len(by_id) == len(found) == len(prompts)
    return by_id


def share_of_same(found, expected) -> float:
    return float(
        np.mean([np.array_equal(found[name].ids_T, expected[name].ids_T) for name in found])
    )


def test_completions_end_where_they_should(vllm_teacher):
    """More prompts than the engine takes at once; none of the ids is vocabulary padding."""
    prompts = some_prompts()
    found = completed(vllm_teacher, prompts, seed=1)
    reasons = [completion.finish_reason for completion in found.values()]
    assert set(reasons) == {"stop", "length"}
    for prompt in prompts:
        completion = found[prompt.sample_id]
        assert completion.ids_T.dtype == np.int32
        is_stop = np.isin(completion.ids_T, STOPS)
        assert not is_stop[:-1].any()
        assert is_stop[-1] == (completion.finish_reason == "stop")
        assert len(completion.ids_T) == 40 or completion.finish_reason == "stop"
        assert 0 <= completion.ids_T.min() <= completion.ids_T.max() < NUM_IDS
    of_one = [tuple(found[f"p0#{k}"].ids_T.tolist()) for k in range(3)]
    assert len(set(of_one)) == 3


def test_the_seed_decides(vllm_teacher):
    """The same seed gives the same tokens, among other requests too; another gives others."""
    prompts = some_prompts()
    found = completed(vllm_teacher, prompts, seed=1)
    assert share_of_same(completed(vllm_teacher, prompts, seed=1), found) >= 0.95
    few = completed(vllm_teacher, prompts[40:50], seed=1)
    assert share_of_same(few, found) >= 0.9
    assert share_of_same(completed(vllm_teacher, prompts, seed=2), found) < 0.1


def test_greedy_is_that_of_transformers(vllm_teacher, hf_teacher):
    prompts = some_prompts(each=1)
    found = completed(vllm_teacher, prompts, temperature=0)
    assert share_of_same(found, completed(hf_teacher, prompts, temperature=0)) >= 0.9


def test_a_small_nucleus_is_greedy(vllm_teacher):
    prompts = some_prompts(each=1)
    found = completed(vllm_teacher, prompts, temperature=0.9, top_p=1e-6)
    assert share_of_same(found, completed(vllm_teacher, prompts, temperature=0)) >= 0.9


def test_tokens_come_as_often_as_transformers_draws_them(vllm_teacher, hf_teacher):
    """First tokens of 1,500 completions each, by temperature and top-p: total variation."""
    ids_T = np.array([5, 9, 40, 77], np.int32)
    prompts = [Prompt(f"p#{k}", ids_T, 1) for k in range(1500)]
    counts = []
    for teacher in (vllm_teacher, hf_teacher):
        found = completed(teacher, prompts, temperature=0.9, top_p=0.9).values()
        counts.append(np.bincount([c.ids_T[0] for c in found], minlength=NUM_IDS))
    ours, theirs = counts
    support = theirs >= 10
    assert support.sum() >= 2
    distance = np.abs(ours - theirs).sum() / 2 / 1500
    assert distance < 3 * np.sqrt(np.count_nonzero(ours + theirs) / 1500)


def test_what_was_generated_is_scored_as_transformers_scores_it(vllm_teacher, hf_teacher):
    """Prefixes are in the cache by then; the signal is of exactly the ids that were drawn."""
    prompts = some_prompts(10, each=2)
    found = completed(vllm_teacher, prompts, seed=5)
    samples = [
        Sample(
            p.sample_id,
            np.concatenate([p.input_ids_T, found[p.sample_id].ids_T]),
            runs=((p.num_tokens, p.num_tokens + len(found[p.sample_id].ids_T)),),
        )
        for p in prompts
    ]
    scored = [
        {
            score.sample_id: score.signal
            for score in teacher.score(samples, parse_selection("topk:k=5"))
        }
        for teacher in (vllm_teacher, hf_teacher)
    ]
    for sample in samples:
        ours, theirs = (scores[sample.sample_id].scalars["label_logprob"] for scores in scored)
        assert len(ours) == sample.num_scored
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_prompt_may_fill_the_model_and_no_more(vllm_teacher):
    fits = Prompt("fits#0", np.full(MAX_LENGTH - 1, 5, np.int32), 1)
    assert len(completed(vllm_teacher, [fits])["fits#0"].ids_T) == 1
    long = Prompt("long#0", np.full(MAX_LENGTH + 2, 5, np.int32), 1)
    with pytest.raises(TeacherError, match="sample 'long#0'"):
        completed(vllm_teacher, [long])


def test_a_caller_may_stop_in_the_middle(vllm_teacher):
    for _ in vllm_teacher.generate([some_prompts()], Sampling(max_tokens=40)):
        break
    assert len(completed(vllm_teacher, some_prompts(4))) == 12
