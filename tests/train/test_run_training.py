"""run_training: from a configuration to a folder that can be used."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kdstore
from kdstore.errors import StoreMismatchError, TrainingError, UsageError
from kdstore.inputs import InputConfig
from kdstore.train.evaluate import evaluate_model
from kdstore.train.heldout import read_held_out
from kdstore.train.run import run_training
from kdstore.train.student import build_student, check_architecture
from tests.train.train_helpers import parameters_of


def test_leaves_a_folder_that_can_be_used(configured, tmp_path, rich_store, capsys):
    metrics = run_training(configured())

    out, store = tmp_path / "out", kdstore.open(rich_store)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert (metrics["steps"], metrics["config_digest"]) == (4, store.config_digest)
    student = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    held_out = read_held_out(configured().eval, tokenizer, InputConfig(), student)
    again = evaluate_model(student, held_out)
    assert again["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert again["num_tokens"] == metrics["eval_num_tokens"] > 10
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "train: 2/4 steps" in printed.err
    assert " left loss " in printed.err
    assert "  ce " in printed.err
    assert " tokens/s" in printed.err


def test_weights_that_are_not_finite_at_the_end_are_saved_and_refused(configured, tmp_path):
    changes = ["max_steps=1", "save_strategy='no'", "learning_rate=1e38", "weight_decay=100"]
    with pytest.raises(TrainingError, match=r"weights that are not finite\n  where: step 1, model"):
        run_training(configured(*(f"training.{change}" for change in changes)), quiet=True)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not student.get_input_embeddings().weight.isfinite().all()


def test_figures_history_and_curves(configured, tmp_path):
    """They agree with each other, and the tokens with what was trained on."""
    metrics = run_training(configured("loader.batch_size=60", "training.logging_steps=1"))
    out = tmp_path / "out"
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    steps = [entry for entry in history if "forward_kl" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    for name in ("loss", "forward_kl", "ce"):
        assert metrics["losses"][name] == [steps[0][name], steps[-1][name]]
    assert metrics["losses"]["ce"][0] > metrics["losses"]["ce"][1] > 0
    assert history[-1]["eval_loss"] == metrics["eval_loss"]
    # Each step is an epoch of all samples.
    assert metrics["num_samples"] == 60
    assert metrics["train_tokens"] == 4 * metrics["num_tokens"]
    rate = metrics["train_tokens"] / metrics["train_seconds"]
    assert metrics["tokens_per_second"] == pytest.approx(rate, rel=0.01)
    assert metrics["student"] == str(out)
    assert metrics["curves"] == str(out / "curves.png")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(configured, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    metrics = run_training(configured("training.max_steps=1"))
    assert metrics["curves"] is None
    assert not (tmp_path / "out" / "curves.png").exists()
    assert "no curves.png: matplotlib is missing: pip install kdstore[report]" in (
        capsys.readouterr().err
    )


def test_quiet_prints_nothing(configured, capfd):
    run_training(configured(), quiet=True)
    assert capfd.readouterr() == ("", "")


def test_a_saved_student_goes_on(configured, tmp_path):
    """Trained weights and their tokenizer are the start of the next run."""
    first = run_training(configured())
    second = run_training(
        configured(
            "student.config=null",
            f"student.path={tmp_path / 'out'}",
            f"training.output_dir={tmp_path / 'second'}",
            "training.learning_rate=0.0",
        )
    )
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "second")("light")["input_ids"]


def test_resume_ends_where_one_run_ends(configured, tmp_path):
    whole = run_training(configured())
    parts = configured(f"training.output_dir={tmp_path / 'parts'}")
    with pytest.raises(UsageError, match=r"nothing to resume\n  where: .*parts"):
        run_training(parts, resume=True)
    run_training(parts)
    for name in ("model.safetensors", "metrics.json"):
        (tmp_path / "parts" / name).unlink()
    (tmp_path / "parts" / "checkpoint-4").rename(tmp_path / "later")

    resumed = run_training(parts, resume=True)

    assert resumed["eval_loss"] == whole["eval_loss"]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "parts")]
    assert torch.equal(parameters_of(models[0]), parameters_of(models[1]))


def test_gradient_checkpointing_trains_the_same_weights(configured, tmp_path):
    weights = []
    for on in ("false", "true"):
        out = tmp_path / on
        config = configured(f"training.gradient_checkpointing={on}", f"training.output_dir={out}")
        run_training(config, quiet=True)
        weights.append(parameters_of(AutoModelForCausalLM.from_pretrained(out)))
    assert torch.equal(*weights)


def test_initial_weights_depend_on_the_seed_alone(configured):
    def initial(*overrides):
        config = configured(*overrides)
        return parameters_of(build_student(config.student, seed=config.seed))

    first = initial()
    torch.rand(3)
    assert torch.equal(first, initial("losses.ce=0", "training.learning_rate=0.5"))
    assert not torch.equal(first, initial("seed=1"))


def num_tokens(folder):
    return len(AutoTokenizer.from_pretrained(folder))


def test_padded_widths_of_heads_may_differ(configured, teacher_dir, tmp_path):
    """Rows that no token has are padding: the fewer, the less they take from the tokens.

    The student is the teacher itself, with other rows, and does not learn.
    """
    found = {}
    for rows in (num_tokens(teacher_dir), 384, 512):
        student = AutoModelForCausalLM.from_pretrained(teacher_dir)
        student.resize_token_embeddings(rows, mean_resizing=False)
        student.save_pretrained(tmp_path / f"head{rows}")
        changes = ["student.config=null", f"student.path={tmp_path / f'head{rows}'}", "eval=null"]
        changes += ["training.learning_rate=0", "training.max_steps=1", "training.logging_steps=1"]
        config = configured(*changes)
        found[rows] = run_training(config, quiet=True)["losses"]["ce"][0]
        assert AutoConfig.from_pretrained(config.output_dir).vocab_size == rows
    assert found[num_tokens(teacher_dir)] < found[384] < found[512] < found[384] + 3


def test_a_smaller_vocabulary_is_refused(configured, teacher_dir, tmp_path):
    tokens = num_tokens(teacher_dir)
    student = AutoConfig.from_pretrained(teacher_dir)
    student.vocab_size = tokens - 1
    student.save_pretrained(tmp_path / "small")
    with pytest.raises(StoreMismatchError, match=rf"store's\n  expected: at least {tokens} rows"):
        run_training(configured(f"student.config={tmp_path / 'small'}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.config=nowhere", r"cannot be loaded\n  where: student.config: nowhere"),
        (
            "student.attn_implementation=fast",
            r"student.attn_implementation: fast\n.*\n  got: .*fast",
        ),
        ("training.lr_scheduler_type=square", "transformers refuses the training arguments"),
        ("training.label_smoothing_factor=0.1", "label_smoothing_factor does not work"),
        ("freeze=[nothing.*]", r"a pattern matches no parameter\n  where: freeze: 'nothing"),
        ("freeze=['*']", "nothing is left to train"),
    ],
)
def test_what_cannot_work_is_refused(configured, override, message):
    with pytest.raises(UsageError, match=message):
        run_training(configured(override))


def test_the_attention_is_chosen(configured):
    config = configured("student.attn_implementation=eager").student
    assert build_student(config, seed=0).config._attn_implementation == "eager"


def test_probes_run_without_the_devices_attention(configured):
    """A kernel of the GPU cannot be probed on the CPU, where students are loaded."""
    model = build_student(configured("student.attn_implementation=flex_attention").student, seed=0)
    used = []
    handle = model.register_forward_pre_hook(
        lambda module, args: used.append(module.config._attn_implementation)
    )
    check_architecture(model, pack=True)
    handle.remove()
    assert set(used) == {"eager"}
    assert model.config._attn_implementation == "flex_attention"


def test_packed_rows_train_alike_with_either_attention(configured, tmp_path):
    """With ours, samples are told apart by their lengths and no mask of the row is made."""
    packed = "loader={batch_tokens: 128, pack: true}"
    found = [
        run_training(
            configured(
                packed,
                f"student.attn_implementation={name}",
                f"training.output_dir={tmp_path / name}",
            ),
            quiet=True,
        )
        for name in ("eager", "varlen_sdpa")
    ]
    assert found[1]["train_loss"] == pytest.approx(found[0]["train_loss"], rel=1e-5)
    assert found[1]["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-5)
    assert "varlen" not in (tmp_path / "varlen_sdpa" / "config.json").read_text()


def test_token_weights_and_whole_logits(configured, tmp_path):
    """Weights reach the losses; losses from hidden states and from whole logits agree."""
    weights = "weights={entropy: [[0.0, 0.5], [3.0, 2.0]]}"
    found = {
        name: run_training(
            configured(*changes, f"training.output_dir={tmp_path / name}"), quiet=True
        )
        for name, changes in {
            "plain": [],
            "weighted": [weights],
            "on logits": [weights, "fused=false"],
        }.items()
    }
    losses = {name: one["train_loss"] for name, one in found.items()}
    assert losses["on logits"] == pytest.approx(losses["weighted"], rel=1e-5)
    assert losses["weighted"] != pytest.approx(losses["plain"], rel=1e-2)


def test_held_out_samples_of_a_store(configured, dump, tmp_path):
    """How the student and the stored teacher agree, beside cross-entropy and calibration."""
    held_out = dump("heldout", select="topk:k=3")
    metrics = run_training(configured(f"eval={{store: {held_out}, max_samples: 5}}"), quiet=True)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = evaluate_model(student, list(kdstore.open(held_out))[:5])
    assert again.keys() >= {"kl", "top1_agreement", "acceptance", "ece", "perplexity"}
    for name, value in again.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
