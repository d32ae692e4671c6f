"""Completions of the hf teacher: what is drawn, and what it does not depend on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from kdstore.completion import Completion, Prompt, Sampling
from kdstore.errors import TeacherError, UsageError
from tests.select.test_draw import dense_distribution
from tests.teachers.test_hf import MODELS, V, saved_model, teacher_at

STOP = 1


def some_prompts(count: int = 12, *, room: int = 20) -> list[Prompt]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 30, count)
    return [
        Prompt(f"p{i}#0", generator.integers(3, V, n).astype(np.int32), room)
        for i, n in enumerate(lengths)
    ]


def completed(
    teacher: object, groups: Sequence[Sequence[Prompt]], **sampling: object
) -> dict[str, Completion]:
    found = list(teacher.generate(groups, Sampling(**sampling)))  # type: ignore[attr-defined, arg-type]
    by_id = {completion.sample_id: completion for completion in found}
    assert len(by_id) == len(found) == sum(map(len, groups))
    return by_id


def assert_same(found: dict[str, Completion], expected: dict[str, Completion]) -> None:
    assert found.keys() == expected.keys()
    for name, completion in found.items():
        np.testing.assert_array_equal(completion.ids_T, expected[name].ids_T, name)
        assert completion.finish_reason == expected[name].finish_reason


def next_logits(folder: Path, ids_T: NDArray[np.int32]) -> NDArray[np.float64]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids_T)[None].long()).logits[0, -1]
    return np.asarray(logits.double())


@pytest.mark.parametrize("name", MODELS)
def test_completions_do_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    """The same ids alone, all in one batch, in small ones and in another order."""
    folder, prompts = saved_model(tmp_path, name), some_prompts()
    options = {"stop_ids": (STOP,), "seed": 3, "top_p": 0.98}
    whole = completed(teacher_at(folder), [prompts], **options)
    alone = completed(teacher_at(folder), [[prompt] for prompt in prompts], **options)
    small = completed(teacher_at(folder, batch_tokens=90), [prompts[::-1]], **options)
    assert_same(whole, alone)
    assert_same(whole, small)
    assert_same(whole, completed(teacher_at(folder), [prompts[5:], prompts[:5]], **options))
    other = completed(teacher_at(folder), [prompts], **{**options, "seed": 4})
    assert any(len(other[n].ids_T) != len(c.ids_T) or (other[n].ids_T != c.ids_T).any()
               for n, c in whole.items())  # fmt: skip


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (1.7, 0.9)])
def test_tokens_come_as_often_as_the_model_says(
    tmp_path: Path, temperature: float, top_p: float
) -> None:
    """Chi-square of 4,000 first and second tokens against the model's softmax: below 5 sigma."""
    folder, count = saved_model(tmp_path, "Llama"), 4000
    ids_T = np.array([5, 9, 40], np.int32)
    prompts = [Prompt(f"p#{k}", ids_T, 2) for k in range(count)]
    found = completed(teacher_at(folder), [prompts], temperature=temperature, top_p=top_p)
    drawn = np.stack([found[prompt.sample_id].ids_T for prompt in prompts])
    first = dense_distribution(next_logits(folder, ids_T), temperature=temperature, top_p=top_p)
    assert_drawn_from(first, drawn[:, 0])
    usual = np.bincount(drawn[:, 0]).argmax()
    behind = next_logits(folder, np.append(ids_T, usual).astype(np.int32))
    second = dense_distribution(behind, temperature=temperature, top_p=top_p)
    assert_drawn_from(second, drawn[drawn[:, 0] == usual, 1])


def assert_drawn_from(p: NDArray[np.float64], drawn: NDArray[np.int32]) -> None:
    counts = np.bincount(drawn, minlength=len(p))
    assert not counts[p == 0].any()
    expected = p * len(drawn)
    cells = [*np.flatnonzero(expected >= 5)]
    rare = expected[expected < 5].sum()
    pairs = [(counts[c], expected[c]) for c in cells]
    if rare >= 5:
        pairs.append((len(drawn) - counts[cells].sum(), rare))
    assert len(pairs) > 1
    chi2 = sum((found - wanted) ** 2 / wanted for found, wanted in pairs)
    freedom = len(pairs) - 1
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom) + 5, (chi2, freedom)


def test_completions_of_one_prompt_differ_and_end_at_a_stop_id_that_they_keep(
    tmp_path: Path,
) -> None:
    prompts = [Prompt(f"p#{k}", np.array([7, 8], np.int32), 60) for k in range(200)]
    stops = (STOP, 30)
    found = completed(teacher_at(saved_model(tmp_path, "Llama")), [prompts], stop_ids=stops)
    assert len({tuple(c.ids_T.tolist()) for c in found.values()}) > 150
    reasons = [completion.finish_reason for completion in found.values()]
    assert min(map(reasons.count, ("stop", "length"))) > 10
    for completion in found.values():
        is_stop = np.isin(completion.ids_T, stops)
        assert not is_stop[:-1].any()
        assert is_stop[-1] == (completion.finish_reason == "stop")
        assert len(completion.ids_T) == 60 or completion.finish_reason == "stop"


def test_greedy_is_the_argmax(tmp_path: Path) -> None:
    """Whatever the checkpoint's own generation config would have."""
    folder = saved_model(tmp_path, "Llama")
    config = transformers.GenerationConfig(repetition_penalty=9.0, do_sample=True, top_k=1)
    config.save_pretrained(folder)
    prompts = some_prompts(4)
    found = completed(teacher_at(folder), [prompts], temperature=0)
    for prompt in prompts:
        ids_T = prompt.input_ids_T
        for token in found[prompt.sample_id].ids_T:
            assert token == next_logits(folder, ids_T).argmax()
            ids_T = np.append(ids_T, token)


def test_each_prompt_has_its_own_room(tmp_path: Path) -> None:
    """GPT2 has no position beyond its last: a row that is longer than its own room would fail."""
    teacher = teacher_at(saved_model(tmp_path, "GPT2"))
    prompts = [Prompt(f"p{n}#0", np.full(n, 5, np.int32), min(20, 64 - n)) for n in range(40, 64)]
    found = completed(teacher, [prompts])
    assert {p.sample_id: p.max_tokens for p in prompts} == {
        name: len(completion.ids_T) for name, completion in found.items()
    }


def test_vocabulary_padding_is_never_drawn(tmp_path: Path) -> None:
    teacher = teacher_at(saved_model(tmp_path, "Llama"), num_ids=20)
    prompts = [Prompt(f"p#{k}", np.array([7], np.int32), 30) for k in range(50)]
    drawn = np.concatenate([c.ids_T for c in completed(teacher, [prompts]).values()])
    assert set(drawn.tolist()) <= set(range(20))
    assert len(set(drawn.tolist())) > 10


def test_logits_that_are_no_distribution_are_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "Llama")
    teacher = teacher_at(folder)
    with torch.no_grad():
        teacher._split.model.lm_head.weight[3] = torch.nan
    with pytest.raises(TeacherError, match="no distribution"):
        completed(teacher, [some_prompts(2)])


@pytest.mark.parametrize(
    "options",
    [{"num_samples": 0}, {"max_tokens": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": -1.0},
     {"temperature": 0.001}, {"temperature": float("nan")}, {"temperature": float("inf")}],
)  # fmt: skip
def test_impossible_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"--(num-samples|max-new-tokens|top-p|temperature)"):
        Sampling(**options)  # type: ignore[arg-type]


def test_seeds_of_engines_differ_by_sample_and_seed() -> None:
    prompts = some_prompts(100)
    seeds = {p.engine_seed(seed=s) for p in prompts for s in (0, 1)}
    assert len(seeds) == 200
    assert 0 <= min(seeds) <= max(seeds) < 1 << 63
