"""kdstore dump --generate, from prompts to a store of what the teacher said of its own answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdstore
from tests.conftest import make_texts, write_jsonl
from tests.writers.test_dump import assert_same_store

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, teacher_dir: Path) -> list[Any]:
    """A dump of 12 prompts with 3 answers each, in blocks of 2 prompts; --out is to be added."""
    texts = [text[:60] for text in make_texts(12, seed=5)]
    rows = [{"id": f"p{n}", "prompt": text, "completion": "?"} for n, text in enumerate(texts)]
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    options = ["dump", "--generate", "--teacher", teacher_dir, "--data", data, "--seed", 4]
    options += ["--num-samples", 3, "--max-new-tokens", 16, "--unit-tokens", 100]
    return [*options, "--audit-fraction", 0.1]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "generated").iterdir())}


def test_answers_are_scored_as_the_model_scores_them(
    tmp_path: Path, teacher_dir: Path, command: list[Any], kdstore_cli: Run
) -> None:
    out = tmp_path / "store"
    code, output, error = kdstore_cli(*command, "--out", out, "--json")
    assert code == 0, error
    assert "generate: " in error
    found, store = json.loads(output), kdstore.open(out)
    tokens = sum(sample.num_scored for sample in store)
    assert found["complete"] is True
    assert (found["num_prompts"], found["num_prompts_too_long"], found["samples"]) == (12, 0, 36)
    assert found["scored"] == found["num_completion_tokens"] == tokens
    assert f"{found['num_completions_cut'] / 36:.1%} cut" in error
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    assert len({tuple(sample.input_ids_T.tolist()) for sample in store}) == 36
    for sample in store:
        user, answer = sample.spans
        assert (user.kind, user.supervised) == ("user", False)
        assert (answer.kind, answer.supervised) == ("assistant", True)
        assert sample.runs == ((answer.start, answer.end),)
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.input_ids_T)[None].long()).logits[0]
        logits[:, len(AutoTokenizer.from_pretrained(teacher_dir)) :] = -torch.inf
        expected = logits.double().log_softmax(-1)[sample.positions_S - 1]
        drawn = sample.input_ids_T[sample.positions_S]
        logprobs = expected[np.arange(sample.num_scored), drawn].numpy()
        assert sample.signal is not None
        stored, close = sample.signal.scalars["label_logprob"], logprobs > -8
        np.testing.assert_allclose(stored[close], logprobs[close], atol=1 / 64 + 1e-4)


def test_a_second_run_changes_nothing_and_the_store_is_whole(
    tmp_path: Path, command: list[Any], kdstore_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"
    assert kdstore_cli(*command, "--out", out, "--quiet")[0] == 0
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    monkeypatch.setattr("kdstore.teachers.hf_backend.HFTeacher", None)  # nothing is left to load
    code, output, _ = kdstore_cli(*command, "--out", out, "--json", "--quiet")
    assert (code, json.loads(output)["complete"]) == (0, True)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    assert kdstore_cli("verify", "--quiet", out)[0] == 0
    assert kdstore_cli("gc", "--older-than", "0", out)[0] == 0
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    code, output, _ = kdstore_cli("inspect", out, "--sample", "p3#1", "--json")
    assert (code, json.loads(output)["sample_id"]) == (0, "p3#1")
    made_by = json.loads((out / "kdstore.json").read_text())["identity"]["source"]["generation"]
    assert made_by["sampling"] == {
        "num_samples": 3,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 16,
        "seed": 4,
        "stop_ids": [1, 2],
    }
    assert made_by["prompts"]["name"] == "prompts"


def test_workers_generate_in_parts_and_say_what_is_missing(
    tmp_path: Path, command: list[Any], kdstore_cli: Run
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert kdstore_cli(*command, "--out", whole, "--quiet")[0] == 0
    code, output, _ = kdstore_cli(*command, "--out", out, "--plan-only", "--json", "--quiet")
    found = json.loads(output)
    assert (code, found["complete"], found["generated"]) == (0, False, "0 of 6 blocks")
    code, output, _ = kdstore_cli(*command, "--out", out, "--unit", "1/2", "--json", "--quiet")
    assert (code, json.loads(output)["missing"]) == (0, "0, 2, 4")
    assert not (out / "kdstore.json").exists()
    for worker in ("0/2", "1/2"):
        assert kdstore_cli(*command, "--out", out, "--unit", worker, "--quiet")[0] == 0
    assert_same_store(whole, out)


def test_other_settings_are_refused(
    tmp_path: Path, command: list[Any], kdstore_cli: Run, dump: Callable[..., Path]
) -> None:
    out = tmp_path / "store"
    assert kdstore_cli(*command, "--out", out, "--quiet")[0] == 0
    for options, field in (
        (("--temperature", "0.5"), "sampling.temperature"),
        (("--top-p", "0.5"), "sampling.top_p"),
        (("--max-length", "100"), "max_length"),
    ):
        code, _, error = kdstore_cli(*command, "--out", out, "--quiet", *options)
        assert (code, f"{field} differs" in error) == (1, True), error
    code, _, error = kdstore_cli(*command, "--out", dump("plain"), "--quiet")
    assert code == 1
    assert "not made of completions" in error
    (out / "generated" / "000002.parquet").unlink()
    code, _, error = kdstore_cli(*command, "--out", out, "--quiet")
    assert code == 1
    assert "no generated/000002.parquet" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top-p", "0.5", "--num-samples", "2"), "got: --num-samples, --top-p"),
        (("--generate", "--top-p", "1.5"), "above 0, at most 1"),
        (("--generate", "--temperature", "-1"), "0, or 0.01 to 100"),
        (("--generate", "--keep-text"), "without --keep-text"),
    ],
)
def test_wrong_usage(
    tmp_path: Path, teacher_dir: Path, data_file: Path, kdstore_cli: Run,
    options: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    common = ("dump", "--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "out")
    code, _, error = kdstore_cli(*common, *options)
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def test_completions_are_data_of_another_dump(
    tmp_path: Path, command: list[Any], kdstore_cli: Run, dump: Callable[..., Path]
) -> None:
    out = tmp_path / "store"
    assert kdstore_cli(*command, "--out", out, "--quiet")[0] == 0
    again = kdstore.open(dump("again", data=out / "generated", select="topk:k=3"))
    for sample, other in zip(kdstore.open(out), again, strict=True):
        assert (sample.sample_id, sample.runs, sample.spans, sample.metadata) == (
            other.sample_id, other.runs, other.spans, other.metadata,
        )  # fmt: skip
        np.testing.assert_array_equal(sample.input_ids_T, other.input_ids_T)


def test_kills_while_generating_change_nothing(
    tmp_path: Path, command: list[Any], kdstore_cli: Run
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert kdstore_cli(*command, "--quiet", "--out", whole)[0] == 0
    program = [sys.executable, "-m", "kdstore_cli.main", *map(str, command), "--quiet", "--out"]
    for blocks in (1, 4):
        process = subprocess.Popen([*program, str(out)], stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("generated/0*.parquet"))) < blocks:
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert blocks <= len(list(out.glob("generated/0*.parquet"))) < 6
    assert kdstore_cli(*command, "--quiet", "--out", out)[0] == 0
    assert kdstore_cli("gc", "--older-than", "0", out)[0] == 0
    assert files_of(out) == files_of(whole)
    assert_same_store(whole, out)
    assert kdstore_cli("verify", "--quiet", out)[0] == 0
