"""The openai teacher against a vLLM server on this machine's CPU, by value."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import kdstore
from kdstore.errors import TeacherError
from kdstore.sample import Sample
from kdstore.select import parse_selection
from tests.teachers.openai_cases import TOP5, V, hf_signals, signals, teacher_of

MAX_LENGTH, MAX_LOGPROBS = 128, 64
START_S = 300

pytestmark = pytest.mark.xdist_group("openai server")


@pytest.fixture(scope="module")
def vllm_url(vllm_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the random Llama, by the name ``tiny``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model": vllm_teacher_dir,
        "served-model-name": "tiny",
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "max-model-len": MAX_LENGTH,
        "max-logprobs": MAX_LOGPROBS,
        "max-num-seqs": 8,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    path = tmp_path_factory.mktemp("vllm") / "log"
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with path.open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with its engine, a process of its own
        )
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}/health", path)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(START_S):
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            break
        return
    raise AssertionError(f"vLLM does not start: {log.read_text()[-4000:]}")


def vllm_samples() -> list[Sample]:
    """Random ids of many lengths, the longest that there is among them."""
    generator = np.random.default_rng(1)
    lengths = [2, 3, 17, 18, 40, 64, 65, 100, MAX_LENGTH - 2, MAX_LENGTH - 1]
    return [
        Sample(f"s{n}", generator.integers(3, V, n).astype(np.int32), runs=((max(1, n // 5), n),))
        for n in lengths
    ]


@pytest.mark.parametrize("k", [1, 5, MAX_LOGPROBS])
def test_scores_of_vllm_are_those_of_the_hf_teacher(
    vllm_url: str, vllm_teacher_dir: Path, k: int
) -> None:
    top = parse_selection(f"topk:k={k}")
    teacher = teacher_of(vllm_url, vllm_teacher_dir, select=top.spec)
    got = signals(teacher, vllm_samples(), top)
    want = hf_signals(vllm_teacher_dir, vllm_samples(), top)
    assert set(got) == set(want) == {sample.sample_id for sample in vllm_samples()}
    same = [(got[name].ids_N == want[name].ids_N).mean() for name in want]
    assert np.average(same, weights=[one.num_entries for one in want.values()]) >= 0.999
    for name, expected in want.items():
        masses = got[name].kept_mass_S
        np.testing.assert_allclose(masses, expected.kept_mass_S, atol=1e-4)
        np.testing.assert_allclose(masses + np.exp(got[name].rest_S), 1.0, atol=1e-5)
        label = got[name].scalars["label_logprob"]
        np.testing.assert_allclose(label, expected.scalars["label_logprob"], atol=1e-3)
    assert teacher.provenance()["server_version"]


@torch.inference_mode()
def test_ranks_of_vllm_are_those_of_the_logits(vllm_url: str, vllm_teacher_dir: Path) -> None:
    """Where no other token is within 1e-3 of the label."""
    model = AutoModelForCausalLM.from_pretrained(vllm_teacher_dir, dtype=torch.float32)
    got = signals(teacher_of(vllm_url, vllm_teacher_dir), vllm_samples())
    compared = 0
    for sample in vllm_samples():
        ids = torch.from_numpy(sample.input_ids_T).long()
        rows_SV = model(input_ids=ids[None]).logits[0].log_softmax(-1)[sample.positions_S - 1]
        labels_S1 = rows_SV.gather(1, ids[sample.positions_S][:, None])
        alone = ((rows_SV - labels_S1).abs() < 1e-3).sum(1) == 1
        ranks = (rows_SV > labels_S1).sum(1) + 1
        found = torch.from_numpy(got[sample.sample_id].scalars["label_rank"])
        assert torch.equal(found[alone].long(), ranks[alone])
        compared += int(alone.sum())
    assert compared > 300


def test_more_logprobs_than_the_server_gives(vllm_url: str, vllm_teacher_dir: Path) -> None:
    teacher = teacher_of(vllm_url, vllm_teacher_dir)
    with pytest.raises(TeacherError, match=r"greater than max allowed: 64[^\0]*--max-logprobs"):
        signals(teacher, vllm_samples()[:1], parse_selection("topk:k=65"))


def test_the_longest_prompt_leaves_room_for_a_token(vllm_url: str, vllm_teacher_dir: Path) -> None:
    long = Sample("long", np.arange(3, 3 + MAX_LENGTH, dtype=np.int32), runs=((1, MAX_LENGTH),))
    with pytest.raises(TeacherError, match=r"'long'\n.*at most 127 tokens"):
        signals(teacher_of(vllm_url, vllm_teacher_dir), [long])


def test_ids_that_the_server_does_not_know(vllm_url: str, vllm_teacher_dir: Path) -> None:
    sample = Sample("wide", np.array([5, 6, V], dtype=np.int32), runs=((1, 3),))
    with pytest.raises(TeacherError, match=r"'wide'\n.*out of vocabulary"):
        signals(teacher_of(vllm_url, vllm_teacher_dir), [sample])


def test_a_dump_from_vllm_resumes(
    dump: Callable[..., Path],
    kdstore_cli: Callable[..., tuple[int, str, str]],
    vllm_url: str,
    vllm_teacher_dir: Path,
) -> None:
    options: dict[str, object] = {
        "teacher": vllm_teacher_dir,
        "backend": "openai",
        "server": vllm_url,
        "model": "tiny",
        "select": TOP5.spec,
    }
    half = dump("store", **options, unit="0/2")
    assert kdstore_cli("verify", half)[0] == 1
    first = {path.name: path.read_bytes() for path in (half / "commits").iterdir()}
    folder = dump("store", **options)
    assert {name: (folder / "commits" / name).read_bytes() for name in first} == first
    assert kdstore_cli("verify", folder)[0] == 0
    store = kdstore.open(str(folder))
    assert (len(store), store.is_complete) == (60, True)
    num_ids = 1 + max(int(sample.signal.ids_N.max()) for sample in store if sample.signal)
    assert num_ids < V  # padding is no entry
    teacher = teacher_of(vllm_url, vllm_teacher_dir, num_ids=num_ids)
    want = signals(teacher, [*store])
    for sample in store:
        assert sample.signal is not None
        expected = want[sample.sample_id]
        np.testing.assert_array_equal(sample.signal.ids_N, expected.ids_N)
        label = sample.signal.scalars["label_logprob"]
        np.testing.assert_allclose(label, expected.scalars["label_logprob"], atol=1 / 32)
