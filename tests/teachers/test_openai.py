"""The openai teacher gives what the hf teacher gives, from servers that fail now and then."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdstore import retry
from kdstore.errors import TeacherError
from kdstore.sample import Sample
from kdstore.select import parse_selection
from kdstore.teachers import openai
from kdstore.teachers.backends import open_backend
from kdstore.teachers.openai_client import asked_wait_s
from tests.teachers.fake_openai import (
    FakeServer,
    hangs_up,
    hangs_up_halfway,
    says,
    says_nothing,
    serving,
)
from tests.teachers.openai_cases import (
    V,
    assert_same,
    hf_signals,
    one_sample,
    options_of,
    signals,
    some_samples,
    teacher_of,
)

FLAVOURS = ("vllm", "sglang")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_scores_are_those_of_the_hf_teacher(teacher_dir: Path, flavour: str) -> None:
    with serving(teacher_dir, flavour=flavour) as server:
        teacher = teacher_of(server.url, teacher_dir)
        got = signals(teacher, some_samples())
    assert_same(got, hf_signals(teacher_dir, some_samples()))
    scalars = {"vllm": {"label_logprob", "label_rank"}, "sglang": {"label_logprob"}}[flavour]
    assert {*got["s0"].scalars} == scalars
    assert {len(post.get("prompt", post.get("input_ids"))) for post in server.posts} == {
        5,
        40,
        17,
        99,
    }
    provenance = teacher.provenance()
    assert (provenance["flavour"], provenance["model"]) == (flavour, "teacher")
    assert provenance["server_version"] == ("fake" if flavour == "vllm" else None)


def test_sglang_is_not_asked_for_logprobs_of_a_masked_prompt(
    teacher_dir: Path, sglang: FakeServer
) -> None:
    signals(teacher_of(sglang.url, teacher_dir), some_samples())
    starts = {len(post["input_ids"]): post["logprob_start_len"] for post in sglang.posts}
    assert starts == {5: 0, 40: 2, 17: 15, 99: 49}


def test_sglang_may_leave_out_the_position_without_logprobs(
    teacher_dir: Path, sglang: FakeServer
) -> None:
    def without_first(answer: dict[str, Any]) -> dict[str, Any]:
        for name in ("input_token_logprobs", "input_top_logprobs"):
            del answer["meta_info"][name][0]
        return answer

    sglang.change = without_first
    got = signals(teacher_of(sglang.url, teacher_dir), some_samples())
    assert_same(got, hf_signals(teacher_dir, some_samples()))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_padding_is_taken_out_where_it_is_seen(teacher_dir: Path, flavour: str) -> None:
    """With all ids as entries it is all seen, so that everything equals the hf teacher's."""
    every, num_ids = parse_selection(f"topk:k={V + 7}"), 300
    samples = [Sample("s", np.arange(3, 40, dtype=np.int32), runs=((1, 37),))]
    with serving(teacher_dir, flavour=flavour) as server:
        teacher = teacher_of(server.url, teacher_dir, num_ids=num_ids)
        got = signals(teacher, samples, every)
    want = hf_signals(teacher_dir, samples, every, num_ids=num_ids)
    assert_same(got, want)
    assert got["s"].entries_S.tolist() == [num_ids] * 36
    assert 0.05 < teacher.provenance()["padding_mass"] < 0.5


@pytest.mark.parametrize(
    "fault",
    [says(429), says(408), says(409), says(425), says(500), says(503), hangs_up, hangs_up_halfway],
)
def test_what_may_pass_is_tried_again(teacher_dir: Path, server: FakeServer, fault: Any) -> None:
    server.faults.extend([fault] * 3)
    got = signals(teacher_of(server.url, teacher_dir), one_sample())
    assert_same(got, hf_signals(teacher_dir, one_sample()))
    assert len(server.posts) == 4


def test_a_silent_server_is_asked_again(teacher_dir: Path, server: FakeServer) -> None:
    server.faults.append(says_nothing)
    got = signals(teacher_of(server.url, teacher_dir, timeout_s=0.3), one_sample())
    assert_same(got, hf_signals(teacher_dir, one_sample()))
    assert len(server.posts) == 2


def test_retry_after_is_honoured(teacher_dir: Path, server: FakeServer) -> None:
    server.faults.append(says(429, retry_after="0.4"))
    signals(teacher_of(server.url, teacher_dir), one_sample())
    first_s, second_s = server.arrivals_s
    assert second_s - first_s >= 0.4


def test_retry_after_is_seconds_or_a_date() -> None:
    later = datetime.now(UTC) + timedelta(seconds=100)
    assert asked_wait_s("7") == 7
    assert asked_wait_s(format_datetime(later, usegmt=True)) == pytest.approx(100, abs=5)
    assert asked_wait_s("86400") == 600
    assert [asked_wait_s(text) for text in (None, "-3", "soon")] == [0, 0, 0]


def test_the_rate_is_kept(teacher_dir: Path, server: FakeServer) -> None:
    teacher = teacher_of(server.url, teacher_dir, requests_per_minute=600)
    signals(teacher, some_samples())
    gaps_s = np.diff(server.arrivals_s)
    assert len(gaps_s) == 3
    assert server.arrivals_s[-1] - server.arrivals_s[0] >= 0.25  # three times 0.1 s, but for jitter


@pytest.mark.parametrize(
    ("limits", "most"), [({"concurrency": 2}, 2), ({"entries": 100}, 1), ({}, 12)]
)
def test_requests_in_flight_are_bounded(
    teacher_dir: Path,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, int],
    most: int,
) -> None:
    monkeypatch.setattr(openai, "MAX_ENTRIES_IN_FLIGHT", limits.get("entries", 1 << 20))
    ids = np.arange(3, 20, dtype=np.int32)
    samples = [Sample(f"s{i}", ids, runs=((1, 17),)) for i in range(12)]
    teacher = teacher_of(server.url, teacher_dir, concurrency=limits.get("concurrency", 32))
    assert len(signals(teacher, samples)) == 12
    assert 1 <= server.most_in_flight <= most


def test_leaving_early_waits_for_nothing(teacher_dir: Path, server: FakeServer) -> None:
    teacher = teacher_of(server.url, teacher_dir, timeout_s=600)
    server.faults.extend([says(400, "no"), says_nothing, says_nothing, says_nothing])
    with pytest.raises(TeacherError, match="refuses"):
        signals(teacher, some_samples())


def test_a_server_that_stays_busy_is_given_up(teacher_dir: Path, server: FakeServer) -> None:
    server.faults.extend([says(503, "engine dead")] * 100)
    with pytest.raises(TeacherError, match=r"sample 's0'\n.*503.*engine dead"):
        signals(teacher_of(server.url, teacher_dir), one_sample())
    assert len(server.posts) == retry.REQUEST_ATTEMPTS


def test_a_server_that_is_not_there(teacher_dir: Path, short_waits: None) -> None:
    options = options_of("http://127.0.0.1:9/v1", teacher_dir)
    with pytest.raises(TeacherError, match=r"does not answer\n.*127.0.0.1:9"):
        open_backend(options)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (says(400, "Requested prompt logprobs of 50, which is greater than max allowed: 20"),
         "--max-logprobs"),
        (says(401, "Incorrect key sk-secret"), r"401 .*Incorrect key …[^\0]*variable MY_KEY"),
        (says(404), "/v1/completions: 404"),
        (says(307, location="/elsewhere"), "307"),
        (lambda handler: handler.send(200, b"<html>"), r"no JSON\n.*'s0'\n.*<html>"),
    ],
)  # fmt: skip
def test_refusals_are_final(
    teacher_dir: Path,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
    message: str,
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server.faults.append(fault)
    with pytest.raises(TeacherError, match=message) as error_info:
        signals(teacher_of(server.url, teacher_dir, api_key_env="MY_KEY"), one_sample())
    assert "sample 's0'" in str(error_info.value)
    assert "sk-secret" not in str(error_info.value)
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert len(server.posts) == 1
