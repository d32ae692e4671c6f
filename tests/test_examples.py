"""The examples run as their users run them, take the same first step, and go on exactly."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import kdstore
from tests.train.launch import run_on_ranks

EXAMPLES = Path(__file__).parents[1] / "examples"
ALL_TOKENS = 10**6
NUM_SAMPLES = 60
# How each example is told to take all samples of the store in a step.
WHOLE_STORE = {
    "bare_loop": ["--batch-tokens", ALL_TOKENS],
    "bare_loop --fused": ["--batch-tokens", ALL_TOKENS],
    "accelerate_script": ["--batch-tokens", ALL_TOKENS],
    "trl_sft": ["--batch-size", NUM_SAMPLES],
}
SMALL = {
    "bare_loop": ["--batch-tokens", 300],
    "accelerate_script": ["--batch-tokens", 150, "--accumulate", 2],
    "trl_sft": ["--batch-size", 4, "--accumulate", 2],
}
Run = Callable[..., list[float]]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """On the CPU, without a network, and nothing left in the user's cache or in accelerate."""
    import datasets
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("CI", "true")  # TRL reports nothing
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path) -> Path:
    """A new model of one layer with the teacher's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(teacher_dir, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_dir).save_pretrained(folder)
    return folder


@pytest.fixture
def run(rich_store: Path, student: Path, tmp_path: Path) -> Run:
    """Runs an example with options; the losses of its steps."""

    def run(name: str, *options: object, output: str = "out") -> list[float]:
        name, *flags = name.split()
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        arguments = [rich_store, student, "--output", tmp_path / output, *flags, *options]
        return list(module.main([str(argument) for argument in arguments]))

    return run


@pytest.fixture
def gradients() -> Iterator[list[Tensor]]:
    """What each optimizer step is given, all values in ascending order: optimizers group them."""
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat([p.grad.reshape(-1).clone() for p in parameters]).sort().values)

    hook = register_optimizer_step_pre_hook(look)
    yield seen
    hook.remove()


@pytest.fixture(scope="module")
def reference(rich_store: Path, student: Path) -> tuple[float, Tensor]:
    """The loss of the whole store, and its gradient, by the functions that the README shows."""
    from transformers import AutoModelForCausalLM

    batch = kdstore.Collator()(list(kdstore.open(rich_store)))
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    loss = kdstore.losses.forward_kl(model(**batch.model_inputs()).logits, batch)
    loss.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    return loss.item(), gradient.sort().values


@pytest.mark.parametrize("name", WHOLE_STORE)
def test_first_step_is_that_of_the_loss_function(
    name: str, run: Run, gradients: list[Tensor], reference: tuple[float, Tensor]
) -> None:
    losses = run(name, *WHOLE_STORE[name], "--steps", 1)
    loss, gradient = reference
    if name == "trl_sft":  # Trainer clips to a norm of 1
        gradient = gradient / max(float(gradient.norm()), 1)
    assert losses == pytest.approx([loss], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_loss_falls_and_a_resumed_run_equals_an_undisturbed_one(
    name: str, run: Run, tmp_path: Path
) -> None:
    options = [*SMALL[name], "--learning-rate", 0.01, "--save-every", 5]
    whole = run(name, *options, "--steps", 10)
    assert sum(whole[-3:]) < 0.9 * sum(whole[:3])

    if name == "trl_sft":  # whose schedule is as long as the run: stopped after step 5
        shutil.copytree(tmp_path / "out" / "checkpoint-5", tmp_path / "again" / "checkpoint-5")
        resumed = run(name, *options, "--steps", 10, "--resume", output="again")[5:]
    else:
        run(name, *options, "--steps", 5, output="again")
        at = [tmp_path / "again" / "checkpoint-5"] if name == "accelerate_script" else []
        resumed = run(name, *options, "--steps", 10, "--resume", *at, output="again")
    assert resumed == whole[5:]
    assert_same_weights(tmp_path / "again", tmp_path / "out", rtol=0, atol=0)


def test_two_processes_take_the_steps_of_one(
    run: Run, rich_store: Path, student: Path, tmp_path: Path
) -> None:
    """Across the end of an epoch, where fillers complete a step; and one goes on where two were."""
    options = ["--batch-tokens", 400, "--save-every", 7]
    assert kdstore.open(rich_store).loader(batch_tokens=400).count_steps() == [9]
    whole = run("accelerate_script", *options, "--accumulate", 4, "--steps", 9)
    run_on_ranks(
        str(EXAMPLES / "accelerate_script.py"),
        *map(str, [rich_store, student, "--output", tmp_path / "two", *options]),
        *("--accumulate", "2", "--steps", "9"),
    )
    assert_same_weights(tmp_path / "two", tmp_path / "out", rtol=1e-4, atol=1e-5)

    at = tmp_path / "two" / "checkpoint-7"
    resumed = run("accelerate_script", *options, "--accumulate", 4, "--steps", 9, "--resume", at)
    assert resumed == pytest.approx(whole[7:], rel=1e-5)


def test_another_tokenizer_is_refused(
    run: Run, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(student)
    other.add_tokens(["unheard-of"])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: other)
    for name in SMALL:
        with pytest.raises(kdstore.KDStoreError, match="other meanings"):
            run(name, "--steps", 1)


def assert_same_weights(found: Path, expected: Path, **tolerance: float) -> None:
    """The saved students of two runs."""
    weights = load_file(found / "model.safetensors")
    for name, tensor in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, **tolerance)
