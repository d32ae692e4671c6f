"""run_training and the command: from a configuration to a folder that can be used."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from kdstore_cli.train import train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import kdstore
from kdstore.align import TokenTable
from kdstore.errors import StoreMismatchError, UsageError
from kdstore.inputs import InputConfig
from kdstore.sample import Sample
from kdstore.train.config import load_config
from kdstore.train.evaluate import evaluate_model
from kdstore.train.run import read_held_out, run_training
from kdstore.train.student import build_student
from tests.train.train_helpers import parameters_of, tiny_config, topk_signal

TEXTS = ["the lamb and the lion", "a time to plant", "the voice of one", "and it was so, the end"]


def make_tokenizer(vocab_size: int = 264) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


class ListStore(list):
    """What run_training asks of a store, around a list of samples."""

    config_digest = "0123abcd"
    is_complete = True
    num_draws = 1

    def __init__(self, tokenizer, samples):
        super().__init__(samples)
        digest = TokenTable.from_tokenizer(tokenizer).fingerprint()
        identity = {
            "vocab_size": len(tokenizer) + 8,
            "vocab_digest": digest,
            "input": InputConfig().to_dict(),
        }
        self.tokenizer, self.header = tokenizer, SimpleNamespace(identity=identity)

    def copy_tokenizer(self, target):
        Path(target).mkdir(parents=True, exist_ok=True)
        text = self.tokenizer.backend_tokenizer.to_str()
        (Path(target) / "tokenizer.json").write_text(text)


@pytest.fixture
def store(monkeypatch):
    """A store of the texts, whatever is opened."""
    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)
    samples = []
    for index, text in enumerate(TEXTS * 2):
        ids = np.array(tokenizer(text)["input_ids"], dtype=np.int32)
        signal = topk_signal(rng.normal(size=(len(ids) - 1, len(tokenizer))), 4)
        samples.append(Sample(str(index), ids, runs=((1, len(ids)),), signal=signal))
    found = ListStore(tokenizer, samples)
    monkeypatch.setattr(kdstore, "open", lambda url: found, raising=False)
    return found


@pytest.fixture
def config_file(tmp_path, store):
    """A configuration in a file: four steps on the CPU, with held-out text."""
    student = tiny_config()
    student.vocab_size = len(store.tokenizer)
    student.save_pretrained(tmp_path / "student")
    rows = [json.dumps({"text": text}) for text in ("the time of the lion", "so it was")]
    (tmp_path / "heldout.jsonl").write_text("\n".join(rows) + "\n")
    content = {
        "store": "anything",
        "student": {"config": str(tmp_path / "student")},
        "losses": {"forward_kl": 1.0, "ce": 0.5},
        "eval": {"data": str(tmp_path / "heldout.jsonl"), "batch_size": 1},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 2,
            "logging_steps": 2,
            "use_cpu": True,
        },
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_leaves_a_folder_that_can_be_used(config_file, tmp_path, capsys):
    metrics = run_training(load_config(config_file))

    out = tmp_path / "out"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert (metrics["steps"], metrics["config_digest"]) == (4, "0123abcd")
    student = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    held_out = read_held_out(load_config(config_file).eval, tokenizer, InputConfig(), student)
    again = evaluate_model(student, held_out)
    assert again["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert again["num_tokens"] == metrics["eval_num_tokens"] > 10
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "step 2/4  loss " in printed.err
    assert "  ce " in printed.err


def test_quiet_prints_nothing(config_file, capfd):
    run_training(load_config(config_file), quiet=True)
    assert capfd.readouterr() == ("", "")


def test_a_saved_student_goes_on(config_file, tmp_path):
    """Trained weights and their tokenizer are the start of the next run."""
    first = run_training(load_config(config_file))
    overrides = [
        "student.config=null",
        f"student.path={tmp_path / 'out'}",
        f"training.output_dir={tmp_path / 'second'}",
        "training.learning_rate=0.0",
    ]
    second = run_training(load_config(config_file, overrides))
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "second")("lion")["input_ids"]


def test_resume_ends_where_one_run_ends(config_file, tmp_path):
    whole = run_training(load_config(config_file))
    parts = [f"training.output_dir={tmp_path / 'parts'}"]
    with pytest.raises(UsageError, match=r"nothing to resume\n  where: .*parts"):
        run_training(load_config(config_file, parts), resume=True)
    run_training(load_config(config_file, parts))
    for name in ("model.safetensors", "metrics.json"):
        (tmp_path / "parts" / name).unlink()
    (tmp_path / "parts" / "checkpoint-4").rename(tmp_path / "later")

    resumed = run_training(load_config(config_file, parts), resume=True)

    assert resumed["eval_loss"] == whole["eval_loss"]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "parts")]
    assert torch.equal(parameters_of(models[0]), parameters_of(models[1]))


def test_initial_weights_depend_on_the_seed_alone(config_file):
    def initial(*overrides):
        config = load_config(config_file, list(overrides))
        return parameters_of(build_student(config.student, seed=config.seed))

    first = initial()
    torch.rand(3)
    assert torch.equal(first, initial("losses.ce=0", "training.learning_rate=0.5"))
    assert not torch.equal(first, initial("seed=1"))


def test_a_smaller_vocabulary_is_refused(config_file, tmp_path, store):
    student = tiny_config()
    student.vocab_size = len(store.tokenizer) - 1
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(StoreMismatchError, match=r"smaller than the store's\n  expected: at least"):
        run_training(load_config(config_file))


def test_another_tokenizer_is_refused(config_file, store):
    store.header.identity["vocab_digest"] = "f" * 64
    with pytest.raises(StoreMismatchError, match="other meanings to the store's token ids"):
        run_training(load_config(config_file))


def test_an_empty_store_is_refused(config_file, store):
    store.clear()
    with pytest.raises(UsageError, match=r"no committed samples\n  where: anything"):
        run_training(load_config(config_file))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.config=nowhere", r"cannot be loaded\n  where: student.config: nowhere"),
        ("training.lr_scheduler_type=square", "transformers refuses the training arguments"),
        ("training.label_smoothing_factor=0.1", "label_smoothing_factor does not work"),
    ],
)
def test_what_cannot_work_is_refused(config_file, override, message):
    with pytest.raises(UsageError, match=message):
        run_training(load_config(config_file, [override]))


def test_command_prints_json(config_file, tmp_path):
    result = CliRunner().invoke(train, [str(config_file), "training.max_steps=1", "--json"])
    assert result.exception is None
    metrics = json.loads(result.stdout)
    assert metrics["steps"] == 1
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "step 1/1" in result.stderr


def test_command_prints_a_table(config_file):
    result = CliRunner().invoke(train, [str(config_file), "--quiet"])
    assert result.stderr == ""
    cells = dict(line.split() for line in result.stdout.splitlines())
    assert cells["steps"] == "4"
    assert float(cells["eval_perplexity"]) > 1


def test_command_raises_usage_errors(config_file):
    """cli/main.py turns them into a message and exit code 2."""
    result = CliRunner().invoke(train, [str(config_file), "seeed=1"])
    assert isinstance(result.exception, UsageError)
