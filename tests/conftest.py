"""A small teacher and its data, made once per run."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

WORDS = ["in", "the", "beginning", "was", "a", "word", "and", "that", "made", "light", "there"]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_texts(count: int, *, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(3, 60))) for _ in range(count)]


def run_dump(*options: object) -> None:
    """Runs ``kdstore dump`` in this process, for a fixture of many tests."""
    from kdstore_cli.main import main

    with pytest.raises(SystemExit) as exit_info:
        main(["dump", "--quiet", *map(str, options)])
    assert not exit_info.value.code


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 384 logits over a byte-level BPE of fewer ids, saved as users save."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(make_texts(50), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    folder = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_teacher_dir(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path) -> Path:
    """A random Llama whose heads are as wide as vLLM's attention on a CPU needs: 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("vllm-teacher")
    shutil.copytree(teacher_dir, folder, dirs_exist_ok=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": f"row-{i}", "text": text} for i, text in enumerate(make_texts(60))]
    return write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", rows)


@pytest.fixture(scope="session")
def rich_store(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, data_file: Path
) -> Path:
    """A store to read only: several row groups a shard, an audit, a second draw, a late scalar."""
    from kdstore.writers import shard

    out = tmp_path_factory.mktemp("rich") / "store"
    common: list[object] = ["--teacher", teacher_dir, "--data", data_file, "--out", out]
    common += ["--unit-tokens", 250, "--audit-fraction", 0.25]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "ROW_GROUP_BYTES", 10_000)
        for options in (
            ["--audit-fraction", 0.25],
            ["--overlay", "second", "--draw", 1],
            ["--overlay", "lse", "--scalars", "lse"],
        ):
            run_dump(*common, *options)
    return out


@pytest.fixture(scope="session")
def plain_store(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, data_file: Path
) -> Path:
    """What ``dump()`` gives, made once: to read only, or to copy."""
    out = tmp_path_factory.mktemp("plain") / "store"
    run_dump("--teacher", teacher_dir, "--data", data_file, "--out", out, "--unit-tokens", 500)
    return out


@pytest.fixture(scope="session")
def processes() -> Any:
    """Processes that have imported everything, and no thread yet."""
    context = multiprocessing.get_context("forkserver")
    workers = ["tests.dump_worker", "tests.train.kill_worker"]
    context.set_forkserver_preload(
        [*workers, "numba", "kdstore.teachers.hf", "kdstore.writers.run"]
    )
    return context


@pytest.fixture
def kdstore_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit code, standard output, standard error)."""
    from kdstore_cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def dump(
    kdstore_cli: Callable[..., tuple[int, str, str]],
    teacher_dir: Path,
    data_file: Path,
    tmp_path: Path,
) -> Callable[..., Path]:
    """Dumps the small teacher over the small data; keyword arguments are further options."""

    def run(name: str = "store", **options: object) -> Path:
        settings: dict[str, object] = {
            "teacher": teacher_dir,
            "data": data_file,
            "out": tmp_path / name,
            "unit_tokens": 500,
            **options,
        }
        arguments = [
            part
            for option, value in settings.items()
            for part in (f"--{option.replace('_', '-')}", value)
        ]
        code, _, error = kdstore_cli("dump", "--quiet", *arguments)
        assert code == 0, error
        return tmp_path / name

    return run
