"""What is trained and what is not: frozen parameters and adapters."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdstore.errors import MissingDependencyError, UsageError
from kdstore.train.config import LoraConfig
from kdstore.train.evaluate import evaluate_model
from kdstore.train.heldout import read_held_out
from kdstore.train.prepare import prepare
from kdstore.train.run import run_training
from kdstore.train.trainable import add_adapters, count_parameters, freeze_parameters
from tests.train.train_helpers import tiny_model


def student_of(teacher_dir):
    return ["student.config=null", f"student.path={teacher_dir}"]


def test_what_is_frozen_stays_as_it_is(configured, teacher_dir):
    patterns = "freeze=['model.layers.0.*', lm_head.weight]"
    config = configured(*student_of(teacher_dir), patterns)
    run_training(config, quiet=True)
    before = AutoModelForCausalLM.from_pretrained(teacher_dir).state_dict()
    after = AutoModelForCausalLM.from_pretrained(config.output_dir).state_dict()
    for name, weights in before.items():
        frozen = name.startswith("model.layers.0.") or name == "lm_head.weight"
        assert torch.equal(weights, after[name]) == frozen, name


def test_tied_weights_are_frozen_by_either_name():
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    freeze_parameters(model, ["lm_head.*"])
    assert not model.model.embed_tokens.weight.requires_grad
    total, trained = count_parameters(model)
    assert total - trained == model.lm_head.weight.numel()


def test_adapters_are_all_that_is_trained_and_saved(configured, teacher_dir, tmp_path):
    from peft import PeftModel

    config = configured(
        *student_of(teacher_dir),
        "lora={r: 2, alpha: 4, target_modules: [q_proj, v_proj]}",
        "training.gradient_checkpointing=true",
    )
    metrics = run_training(config, quiet=True)
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    assert not (out / "checkpoint-4" / "model.safetensors").exists()
    adapters = load_file(out / "adapter_model.safetensors")
    # Two layers of 32 columns; keys and values have 16.
    assert sum(weights.numel() for weights in adapters.values()) == 2 * 2 * (64 + 48)
    assert all(weights.any() for name, weights in adapters.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(teacher_dir)
    before = {name: weights.clone() for name, weights in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, out)
    held_out = read_held_out(config.eval, *tokenizer_and_inputs(config), adapted)
    assert evaluate_model(adapted, held_out)["loss"] == pytest.approx(metrics["eval_loss"])
    merged = adapted.unload().state_dict()
    assert all(torch.equal(weights, merged[name]) for name, weights in before.items())


def tokenizer_and_inputs(config):
    from kdstore.inputs import InputConfig

    prepared = prepare(config, quiet=True)
    return prepared.tokenizer, InputConfig.from_dict(prepared.data.header.identity["input"])


def test_nothing_but_adapters_changes_in_training(configured, teacher_dir):
    from kdstore.train.prepare import make_trainer

    config = configured(*student_of(teacher_dir), "lora={r: 2}", "training.save_strategy='no'")
    prepared = prepare(config, quiet=True)
    before = {name: weights.clone() for name, weights in prepared.model.state_dict().items()}
    make_trainer(config, prepared, callbacks=[]).train()
    for name, weights in prepared.model.state_dict().items():
        assert torch.equal(weights, before[name]) == ("lora_" not in name), name


def test_adapters_go_on_from_a_checkpoint(configured, teacher_dir, tmp_path):
    changes = [*student_of(teacher_dir), "lora={r: 2, target_modules: [q_proj]}"]
    run_training(configured(*changes), quiet=True)
    out = tmp_path / "out"
    whole = load_file(out / "adapter_model.safetensors")
    (out / "checkpoint-4").rename(tmp_path / "later")
    (out / "adapter_model.safetensors").unlink()
    run_training(configured(*changes), resume=True, quiet=True)
    for name, weights in load_file(out / "adapter_model.safetensors").items():
        assert torch.equal(weights, whole[name]), name


def test_adapters_begin_as_the_seed_says():
    def initial(seed):
        model = add_adapters(tiny_model(), LoraConfig(r=2), seed=seed).state_dict()
        return torch.cat([model[name].flatten() for name in model if "lora_A" in name])

    first = initial(0)
    assert torch.equal(first, initial(0))
    assert not torch.equal(first, initial(1))


def test_modules_that_there_are_not():
    with pytest.raises(UsageError, match=r"peft refuses these adapters\n.*\n.*\n  got: .*wqkv"):
        add_adapters(tiny_model(), LoraConfig(target_modules=["wqkv"]), seed=0)


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install kdstore\[peft\]"):
        add_adapters(tiny_model(), LoraConfig(), seed=0)
