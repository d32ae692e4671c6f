"""A dry run: figures of one real step, and nothing left behind."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kdstore
from kdstore.errors import StoreMismatchError
from kdstore.train.dryrun import dry_run
from kdstore.train.evaluate import evaluate_model
from kdstore.train.heldout import read_held_out
from kdstore.train.run import run_training
from kdstore.train.trainable import count_parameters
from tests.train.conftest import HELD_OUT


def test_figures_of_the_first_step(configured, rich_store, teacher_dir, tmp_path):
    changes = [
        "student.config=null",
        f"student.path={teacher_dir}",
        "freeze=[lm_head.weight]",
        "training.max_steps=-1",
        "training.num_train_epochs=3",
        "training.gradient_accumulation_steps=2",
        "training.logging_steps=1",
    ]
    before = sorted(tmp_path.rglob("*"))
    found = dry_run(configured(*changes), quiet=True)
    assert sorted(tmp_path.rglob("*")) == before

    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    total, _ = count_parameters(teacher)
    assert found["parameters"] == total
    assert found["parameters_trained"] == total - 384 * 32
    store = kdstore.open(rich_store)
    assert (found["num_samples"], found["num_tokens"]) == (60, sum(s.num_tokens for s in store))
    assert found["steps_planned"] == 3 * 8  # of 15 batches of 4, by twos
    assert [rows for rows, _ in found["batch_shapes"]] == [4, 4]
    assert found["peak_memory_of"] == "process"
    assert found["peak_memory_bytes"] > 10**8
    assert found["tokens_per_second"] > 0
    # It is the first step of the run itself.
    metrics = run_training(configured(*changes, "training.max_steps=1"), quiet=True)
    assert found["losses"] == {name: values[0] for name, values in metrics["losses"].items()}


def test_one_batch_of_the_longest_is_evaluated(configured, teacher_dir):
    config = configured(
        "student.config=null", f"student.path={teacher_dir}", "training.learning_rate=0"
    )
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    inputs = kdstore.inputs.InputConfig()
    held_out = read_held_out(config.eval, tokenizer, inputs, teacher)
    assert len(held_out) == len(HELD_OUT)
    longest = max(held_out, key=lambda sample: sample.num_tokens)
    expected = evaluate_model(teacher, [longest])["loss"]
    assert dry_run(config, quiet=True)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert "eval_loss" not in dry_run(configured("eval=null"), quiet=True)


def test_settings_that_save_or_report_are_put_aside(configured, tmp_path):
    changes = ["training.load_best_model_at_end=true", "training.eval_strategy=steps"]
    changes += ["training.eval_steps=2", "training.report_to=tensorboard", "training.save_steps=1"]
    assert dry_run(configured(*changes), quiet=True)["steps_planned"] == 4
    assert not (tmp_path / "out").exists()


def test_what_a_run_refuses_is_refused(configured, teacher_dir, tmp_path):
    small = AutoConfig.from_pretrained(teacher_dir)
    small.vocab_size = 100
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(StoreMismatchError, match="smaller than the store's"):
        dry_run(configured(f"student.config={tmp_path / 'small'}"), quiet=True)
