"""Blocks of completions: whole or absent, the same after any interruption, refused if others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from kdstore.completion import Sampling
from kdstore.errors import HeaderError, InputError, StoreMismatchError, TeacherError, UsageError
from kdstore.generate.blocks import CompletionBuilder, CompletionCounters
from kdstore.inputs import InputConfig
from kdstore.layout import GENERATION, block_path
from tests.generate.helpers import (
    FakeTeacher,
    StoppedError,
    answer_to,
    data_of,
    open_at,
    prompt_rows,
)


@pytest.fixture(scope="module")
def tokenizer(teacher_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(teacher_dir)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return data_of(tmp_path, prompt_rows())


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "generated").iterdir())}


def test_rows_are_those_that_a_dump_takes(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    generation = open_at(tmp_path / "out", data, tokenizer)
    assert generation.pending_blocks() == [0, 1, 2, 3]
    generation.run(FakeTeacher(), [0, 1, 2, 3], quiet=True)
    assert generation.pending_blocks() == []
    rows = generation.completions()
    counters = CompletionCounters(num_prompts=10)
    builder = CompletionBuilder(tokenizer, InputConfig(), rows.name, counters=counters)
    samples = [sample for row in rows.rows() for sample in builder.samples(*row)]
    assert [s.sample_id for s in samples] == [f"p{n}#{k}" for n in range(10) for k in (0, 1)]
    requests = [
        request
        for _, prompts in generation.blocks([0, 1, 2, 3])
        for prompt in prompts
        for request in generation.source.requests(prompt, generation.sampling)
    ]
    for sample, request in zip(samples, requests, strict=True):
        answer, length = answer_to(request), request.num_tokens
        assert sample.input_ids_T.tolist() == [*request.input_ids_T, *answer.ids_T]
        kinds = [(s.start, s.end, s.kind, s.supervised) for s in sample.spans]
        assert kinds == [
            (0, length, "text", False),
            (length, sample.num_tokens, "assistant", True),
        ]
        assert sample.metadata == {
            "n": int(sample.sample_id[1:-2]),
            "generation": {
                "prompt": sample.sample_id[:-2],
                "finish_reason": answer.finish_reason,
            },
        }
    assert counters.num_completion_tokens == sum(len(answer_to(r).ids_T) for r in requests)
    cut = sum(answer_to(r).finish_reason == "length" for r in requests)
    assert 0 < cut == counters.num_completions_cut < 20
    assert counters.to_dict()["num_prompts"] == 10


def test_an_interruption_anywhere_changes_nothing(
    tmp_path: Path, data: Path, tokenizer: Any
) -> None:
    whole = open_at(tmp_path / "whole", data, tokenizer)
    whole.run(FakeTeacher(), whole.pending_blocks(), quiet=True)
    expected = files_of(tmp_path / "whole")
    assert list(expected) == [*(f"{n:06d}.parquet" for n in range(4)), "_generation.json"]
    for limit in range(1, 20):
        out = tmp_path / f"out{limit}"
        first = open_at(out, data, tokenizer)
        with pytest.raises(StoppedError):
            first.run(FakeTeacher(limit=limit), first.pending_blocks(), quiet=True)
        second, teacher = open_at(out, data, tokenizer), FakeTeacher()
        pending = second.pending_blocks()
        assert (len(pending) < 4) == (limit >= 6)  # backwards: block 1 is first, with 6
        second.run(teacher, pending, quiet=True)
        assert len(teacher.asked) == sum(2 if block == 3 else 6 for block in pending)
        assert files_of(out) == expected


def test_workers_share_the_blocks(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    generation = open_at(tmp_path / "out", data, tokenizer)
    dealt = [generation.pending_blocks(worker=i, num_workers=3) for i in range(3)]
    assert dealt == [[0, 3], [1], [2]]
    teacher = FakeTeacher()
    generation.run(teacher, dealt[0], quiet=True)
    assert sorted(teacher.asked) == [f"p{n}#{k}" for n in (0, 1, 2, 9) for k in (0, 1)]
    assert open_at(tmp_path / "out", data, tokenizer).pending_blocks() == [1, 2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed differs"),
        ({"sampling": {"top_p": 0.5}}, "sampling.top_p differs"),
        ({"block_rows": 4}, "block_rows differs"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, data: Path, tokenizer: Any, changed: dict[str, Any], message: str
) -> None:
    first = {"sampling": {"top_p": 1.0}}
    open_at(tmp_path / "out", data, tokenizer, identity=first)
    with pytest.raises(StoreMismatchError, match=message):
        open_at(tmp_path / "out", data, tokenizer, identity={**first, **changed})


def test_other_prompts_are_refused(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    open_at(tmp_path / "out", data, tokenizer)
    data_of(tmp_path, prompt_rows(9))
    with pytest.raises(StoreMismatchError, match=r"prompts\.files differs"):
        open_at(tmp_path / "out", data, tokenizer)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content | {"version": 2},
        lambda content: content | {"num_rows": "10"},
        lambda content: content | {"identity": {**content["identity"], "seed": 7}},
        lambda content: {name: value for name, value in content.items() if name != "num_prompts"},
    ],
)
def test_damaged_settings_are_refused(
    tmp_path: Path, data: Path, tokenizer: Any, damage: Any
) -> None:
    open_at(tmp_path / "out", data, tokenizer)
    file = tmp_path / "out" / GENERATION
    file.write_text(json.dumps(damage(json.loads(file.read_bytes()))))
    with pytest.raises(HeaderError, match="completions"):
        open_at(tmp_path / "out", data, tokenizer)


def test_prompts_without_room_are_left_out_and_named(
    tmp_path: Path, data: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = open_at(tmp_path / "out", data, tokenizer, max_length=8)
    assert "3 prompts leave no room" in (error := capsys.readouterr().err)
    assert "p7, p8, p9" in error
    settings = generation.settings
    assert (settings.num_rows, settings.num_prompts, settings.num_too_long) == (10, 7, 3)
    generation.run(FakeTeacher(), generation.pending_blocks(), quiet=True)
    lengths = [len(row["input_ids"]) for _, row in generation.completions().rows()]
    assert len(lengths) == 14
    assert max(lengths) == 8
    assert pq.read_metadata(tmp_path / "out" / block_path(3)).num_rows == 0
    with pytest.raises(InputError, match="sample 'p7'"):
        open_at(tmp_path / "other", data, tokenizer, max_length=8, overlong="error")


def test_a_damaged_block_and_rows_that_are_wrong_are_refused(
    tmp_path: Path, data: Path, tokenizer: Any
) -> None:
    generation = open_at(tmp_path / "out", data, tokenizer)
    generation.run(FakeTeacher(), generation.pending_blocks(), quiet=True)
    (tmp_path / "out" / block_path(1)).write_bytes(b"PAR1")
    with pytest.raises(InputError, match=block_path(1)):
        list(generation.completions().rows())
    for rows, message in (
        ([{"input_ids": [1, 320]}], "outside the teacher's logits"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "two samples have the id 'a'"),
        ([{"text": ""}], "no samples"),
        ([{"completion": "only"}], "expected: input_ids, or messages, or prompt, or text"),
    ):
        with pytest.raises(InputError, match=message):
            open_at(tmp_path / "new", data_of(tmp_path, rows), tokenizer)
        assert not (tmp_path / "new").exists()


def test_a_folder_with_something_else_is_left_alone(
    tmp_path: Path, data: Path, tokenizer: Any
) -> None:
    with pytest.raises(UsageError, match="not empty"):
        open_at(data.parent, data, tokenizer)


def test_a_teacher_that_leaves_a_prompt_out_is_refused(
    tmp_path: Path, data: Path, tokenizer: Any
) -> None:
    class Lazy(FakeTeacher):
        def generate(self, groups: Any, sampling: Sampling) -> Any:
            return (c for c in super().generate(groups, sampling) if c.sample_id != "p4#1")

    generation = open_at(tmp_path / "out", data, tokenizer)
    with pytest.raises(TeacherError, match="p4#1"):
        generation.run(Lazy(), generation.pending_blocks(), quiet=True)
    assert generation.pending_blocks() == [1]


def test_progress_tells_tokens_time_and_what_was_cut(
    tmp_path: Path, data: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = open_at(tmp_path / "out", data, tokenizer)
    generation.run(FakeTeacher(), generation.pending_blocks(), quiet=False)
    found = capsys.readouterr().err
    tokens = sum(len(row["input_ids"]) for _, row in generation.completions().rows()) - 2 * 55
    assert f"generate: {tokens}/{tokens} tokens, " in found
    assert "tokens/s in 20 completions, " in found
    assert "% cut at their limit" in found
