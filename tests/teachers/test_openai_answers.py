"""Answers that are not what was asked for are refused, with the sample that they are of."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdstore.errors import TeacherError
from tests.teachers.fake_openai import (
    FakeServer,
)
from tests.teachers.openai_cases import (
    one_sample,
    signals,
    teacher_of,
)

FLAVOURS = ("vllm", "sglang")


def rows_of(answer: dict[str, Any]) -> list[Any]:
    rows: list[Any] = answer["choices"][0]["prompt_logprobs"]
    return rows


def tops_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The most probable tokens of position 2, most probable first."""
    return sorted(rows_of(answer)[2].values(), key=lambda one: one["rank"])


def renamed(answer: dict[str, Any], name: str) -> None:
    """The most probable token of position 2 has another id."""
    row = rows_of(answer)[2]
    row[name] = row.pop(next(key for key, one in row.items() if one["rank"] == 1))


VLLM_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "nothing": (lambda answer: answer.clear(), "KeyError: 'choices'"),
    "no logprobs": (lambda answer: answer["choices"][0].clear(), "KeyError: 'prompt_logprobs'"),
    "chat": (lambda answer: answer["choices"].append({}), "ValueError"),
    "truncated": (lambda answer: answer["usage"].update(prompt_tokens=4), "5 tokens of the prompt"),
    "bos": (lambda answer: rows_of(answer).append({}), "5 positions"),
    "shifted": (lambda answer: rows_of(answer).append(rows_of(answer).pop(1)), "another prompt"),
    "null": (lambda answer: rows_of(answer).__setitem__(3, None), "TypeError"),
    "nan": (lambda answer: tops_of(answer)[0].update(logprob=math.nan), "no distribution"),
    "gap": (lambda answer: tops_of(answer)[0].update(logprob=None), "no distribution"),
    "logits": (lambda answer: tops_of(answer)[0].update(logprob=3.0), "no distribution"),
    "sum": (lambda answer: [one.update(logprob=-0.5) for one in tops_of(answer)[:5]], "a sum of"),
    "id": (lambda answer: renamed(answer, "384"), "ids from 0 to 383"),
    "text": (lambda answer: renamed(answer, " the"), "ValueError"),
    "fewer": (lambda answer: tops_of(answer)[1].update(rank=9), "the 5 most probable"),
    "rank": (lambda answer: tops_of(answer)[0].pop("rank"), "KeyError: 'rank'"),
}


@pytest.mark.parametrize("name", VLLM_DAMAGE)
def test_wrong_answers_of_vllm_are_refused(
    teacher_dir: Path, server: FakeServer, name: str
) -> None:
    damage, message = VLLM_DAMAGE[name]

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        damage(answer)
        return answer

    server.change = change
    with pytest.raises(TeacherError, match=message) as error_info:
        signals(teacher_of(server.url, teacher_dir), one_sample())
    assert "sample 's0'" in str(error_info.value)


def test_a_token_of_no_probability_is_no_entry(teacher_dir: Path, server: FakeServer) -> None:
    """vLLM writes -9999 for minus infinity."""
    token = int(one_sample()[0].input_ids_T[2])

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        for key, one in rows_of(answer)[2].items():
            if one["rank"] == 5 or key == str(token):
                one["logprob"] = -9999.0
        return answer

    server.change = change
    signal = signals(teacher_of(server.url, teacher_dir), one_sample())["s0"]
    assert signal.entries_S.tolist() == [5, 4, 5, 5]
    assert signal.scalars["label_logprob"][1] == -np.inf


def meta_of(answer: dict[str, Any]) -> dict[str, Any]:
    meta: dict[str, Any] = answer["meta_info"]
    return meta


SGLANG_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "nothing": (lambda answer: answer.clear(), "KeyError: 'meta_info'"),
    "no tops": (lambda answer: meta_of(answer).pop("input_top_logprobs"), "input_top_logprobs"),
    "truncated": (lambda answer: meta_of(answer).update(prompt_tokens=4), "tokens of the prompt"),
    "fewer": (lambda answer: meta_of(answer)["input_top_logprobs"].pop(), "5 and 4"),
    "no label": (lambda answer: meta_of(answer)["input_token_logprobs"][2].__setitem__(0, None),
                 "no distribution"),
    "shifted": (lambda answer: meta_of(answer)["input_token_logprobs"].reverse(), "another prompt"),
    "null": (lambda answer: meta_of(answer)["input_top_logprobs"].__setitem__(2, None),
             "TypeError"),
    "twice": (lambda answer: meta_of(answer)["input_top_logprobs"][2].__setitem__(
        0, meta_of(answer)["input_top_logprobs"][2][1]), "4 different ones in 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", SGLANG_DAMAGE)
def test_wrong_answers_of_sglang_are_refused(
    teacher_dir: Path, sglang: FakeServer, name: str
) -> None:
    damage, message = SGLANG_DAMAGE[name]

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        damage(answer)
        return answer

    sglang.change = change
    with pytest.raises(TeacherError, match=message) as error_info:
        signals(teacher_of(sglang.url, teacher_dir), one_sample())
    assert "sample 's0'" in str(error_info.value)
