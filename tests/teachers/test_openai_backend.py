"""What a server is asked before a dump, and what is refused without asking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdstore
from kdstore.errors import TeacherError, UsageError
from kdstore.sample import Sample
from kdstore.select import parse_selection
from kdstore.teachers.backends import open_backend
from kdstore.teachers.openai_options import ServerOptions
from kdstore.train.config import TeacherConfig
from kdstore.train.fields import build
from tests.conftest import make_texts, write_jsonl
from tests.teachers.fake_openai import (
    FakeServer,
    serving,
)
from tests.teachers.openai_cases import (
    TOP5,
    V,
    one_sample,
    options_of,
    signals,
    teacher_of,
)

FLAVOURS = ("vllm", "sglang")


def test_models_and_flavours_are_named_or_found(teacher_dir: Path, server: FakeServer) -> None:
    server.cards.append({"id": "other", "owned_by": "someone"})
    with pytest.raises(UsageError, match=r"several models\n.*\n.*teacher, other"):
        open_backend(options_of(server.url, teacher_dir))
    with pytest.raises(UsageError, match=r"no such model\n.*\n.*teacher, other"):
        open_backend(options_of(server.url, teacher_dir, model="third"))
    with pytest.raises(UsageError, match=r"--flavour vllm or sglang\n.*'someone'"):
        open_backend(options_of(server.url, teacher_dir, model="other"))
    backend = open_backend(options_of(server.url, teacher_dir, model="other", flavour="sglang"))
    assert backend.config().scalars == ("label_logprob",)
    assert (backend.info.dtype, backend.info.max_length) == ("server", 128)
    server.cards[:] = [{"name": "no id"}]
    with pytest.raises(TeacherError, match="lists no models"):
        open_backend(options_of(server.url, teacher_dir))


def test_a_prompt_leaves_room_for_a_token(teacher_dir: Path, server: FakeServer) -> None:
    backend = open_backend(options_of(server.url, teacher_dir, dtype="bf16"))
    assert (backend.info.dtype, backend.info.max_length) == ("bfloat16", 99)
    long = Sample("long", np.arange(3, 103, dtype=np.int32), runs=((1, 100),))
    with pytest.raises(TeacherError, match=r"longer than the teacher takes\n.*'long'\n.*99 tokens"):
        next(backend.load(num_ids=V).score([long], TOP5, scalars=(), seed=0))
    assert server.posts == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"select": "pps:tau=0.02"}, "--select pps"),
        ({"audit_fraction": 0.1}, "--audit-fraction"),
        ({"temperatures": [2.0]}, "--temperatures"),
        ({"backend": "hf"}, "only the backend openai"),
    ],
)
def test_what_a_server_cannot_give_is_refused_before_it_is_asked(
    teacher_dir: Path, changes: dict[str, Any], what: str
) -> None:
    options = options_of("http://127.0.0.1:9/v1", teacher_dir, **changes)
    with pytest.raises(UsageError, match=what):
        open_backend(options)


def test_scores_of_more_than_a_server_gives_are_refused(
    teacher_dir: Path, server: FakeServer
) -> None:
    teacher = teacher_of(server.url, teacher_dir)
    for selection, more in (
        (parse_selection("full"), {}),
        (TOP5, {"scalars": ["entropy"]}),
        (TOP5, {"audit_fraction": 0.5}),
    ):
        with pytest.raises(UsageError, match="needs full logits"):
            signals(teacher, one_sample(), selection, **more)
    assert server.posts == []


@pytest.mark.parametrize(
    "options",
    [
        {"url": "host:8000/v1"},
        {"url": "http://me:secret@host/v1"},
        {"url": "http://host", "concurrency": 0},
        {"url": "http://host", "requests_per_minute": 0.0},
    ],
)
def test_wrong_options_of_a_server(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error_info:
        ServerOptions(**options)
    assert "secret" not in str(error_info.value)


def test_the_teacher_of_a_training_names_its_server() -> None:
    section = {"path": "P", "data": "D", "backend": "openai", "server": {"url": "http://h/v1/"}}
    server = build(TeacherConfig, section).server
    assert server is not None
    assert (server.root, server.concurrency, server.api_key_env) == (
        "http://h",
        32,
        "OPENAI_API_KEY",
    )
    with pytest.raises(UsageError, match=r"did you mean 'server.model'"):
        build(TeacherConfig, {**section, "server": {"url": "http://h", "modle": "m"}})


def test_a_named_key_must_be_there(teacher_dir: Path, server: FakeServer) -> None:
    with pytest.raises(UsageError, match="NO_SUCH_VARIABLE"):
        open_backend(options_of(server.url, teacher_dir, api_key_env="NO_SUCH_VARIABLE"))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_dump_from_a_server(
    dump: Callable[..., Path],
    kdstore_cli: Callable[..., tuple[int, str, str]],
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flavour: str,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    # all ids are entries, so that all padding is seen and taken out, as the hf teacher does
    rows = [{"id": f"row-{i}", "text": text} for i, text in enumerate(make_texts(12))]
    data = write_jsonl(tmp_path / "few.jsonl", rows)
    common: dict[str, object] = {"select": "topk:k=384", "max_length": 90, "data": data}
    with serving(teacher_dir, flavour=flavour) as server:
        folder = dump(**common, backend="openai", server=server.url, concurrency=4)
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    assert not [
        path for path in folder.rglob("*") if path.is_file() and b"sk-s" in path.read_bytes()
    ]
    assert kdstore_cli("verify", folder)[0] == 0
    assert kdstore_cli("stats", folder)[0] == 0
    assert kdstore_cli("inspect", folder, "--sample", 0)[0] == 0
    stored, wanted = kdstore.open(str(folder)), kdstore.open(str(dump("hf", **common)))
    assert len(stored) == len(wanted) == 12
    for sample, other in zip(stored, wanted, strict=True):
        assert sample.signal is not None
        assert other.signal is not None
        assert (sample.sample_id, sample.runs) == (other.sample_id, other.runs)
        np.testing.assert_array_equal(sample.signal.ids_N, other.signal.ids_N)
        got, want = np.exp(sample.signal.logprobs_N), np.exp(other.signal.logprobs_N)
        np.testing.assert_allclose(got, want, atol=0.02)
        names = {"vllm": {"label_logprob", "label_rank"}, "sglang": {"label_logprob"}}[flavour]
        assert {*sample.signal.scalars} == names
        got, want = (one.scalars["label_logprob"] for one in (sample.signal, other.signal))
        np.testing.assert_allclose(got, want, atol=1 / 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model m", "model without a server"),
        ("--backend openai", "asks a server"),
        ("--backend openai --server http://127.0.0.1:9 --overlay more --scalars lse", "--overlay"),
    ],
)
def test_wrong_command_lines(
    kdstore_cli: Callable[..., tuple[int, str, str]],
    teacher_dir: Path,
    data_file: Path,
    tmp_path: Path,
    options: str,
    message: str,
) -> None:
    common = ["--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "store"]
    code, _, error = kdstore_cli("dump", *common, "--select", "topk:k=5", *options.split())
    assert (code, message in error) == (2, True), error
    assert not (tmp_path / "store").exists()
