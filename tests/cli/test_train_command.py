"""kdstore train on a real store: from a dump to a student, resumed and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import kdstore
from kdstore.readers.sampler import EpochSampler
from kdstore.readers.store import Store

Dump = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config_file(dump: Dump, teacher_dir: Path, data_file: Path, tmp_path: Path) -> Path:
    content = {
        "store": str(dump()),
        "student": {"config": str(teacher_dir)},
        "loader": {"batch_size": 16},
        "eval": {"data": str(data_file)},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 6,
            "save_steps": 2,
            "learning_rate": 0.01,
            "use_cpu": True,
        },
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_student_learns_from_a_real_store(kdstore_cli: Run, config_file: Path) -> None:
    losses = []
    for steps in (1, 6):
        code, output, error = kdstore_cli(
            "train", config_file, f"training.max_steps={steps}", "--json", "--quiet"
        )
        assert code == 0, error
        losses.append(json.loads(output)["eval_loss"])
    assert losses[1] < losses[0] - 0.05


def test_resume_ends_where_one_run_ends(
    kdstore_cli: Run, config_file: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert kdstore_cli("train", config_file, f"training.output_dir={whole}", "--quiet")[0] == 0
    train = ("train", config_file, f"training.output_dir={parts}", "--quiet")
    # The schedule of six steps, stopped after the checkpoint of the fourth.
    assert kdstore_cli(*train)[0] == 0
    for name in ("checkpoint-6", "model.safetensors"):
        target = parts / name
        if target.is_dir():
            for file in target.iterdir():
                file.unlink()
            target.rmdir()
        else:
            target.unlink()
    assert kdstore_cli(*train, "--resume")[0] == 0
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=0)


def test_resume_of_another_run_is_refused(kdstore_cli: Run, config_file: Path, dump: Dump) -> None:
    assert kdstore_cli("train", config_file, "--quiet")[0] == 0
    other = dump("other", select="topk:k=3")
    for change, field in (
        (f"store={other}", "store"),
        ("losses.ce=0.5", "losses"),
        ("seed=1", "seed"),
    ):
        code, _, error = kdstore_cli("train", config_file, change, "--resume", "--quiet")
        assert code == 1
        assert f"of another run: {field}" in error
    dump(overlay="draw1", draw=1)
    code, _, error = kdstore_cli("train", config_file, "--resume", "--quiet")
    assert (code, "of another run: draws" in error) == (1, True), error


def test_each_epoch_reads_the_next_draw(
    kdstore_cli: Run, config_file: Path, dump: Dump, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(overlay="draw1", draw=1)
    read: list[tuple[int, int]] = []
    get = Store.__getitems__
    monkeypatch.setattr(
        Store, "__getitems__", lambda self, pairs: read.extend(pairs) or get(self, pairs)
    )
    assert kdstore_cli("train", config_file, "training.max_steps=12", "--quiet")[0] == 0
    epochs = [read[start : start + 60] for start in range(0, len(read), 60)]
    assert [{draw for _, draw in epoch} for epoch in epochs] == [{0}, {1}, {0}]
    assert [sorted(index for index, _ in epoch) for epoch in epochs] == [list(range(60))] * 3


def test_an_unfinished_store_is_said(kdstore_cli: Run, config_file: Path, dump: Dump) -> None:
    part = dump("part", unit="0/2")
    code, output, error = kdstore_cli(
        "train", config_file, f"store={part}", "training.max_steps=1", "--json"
    )
    assert code == 0
    assert "unfinished" in error
    assert json.loads(output)["store_complete"] is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["eval.batch_size=0"], "eval.batch_size"),
        (["eval.max_length=4096"], "128"),
        (["losses.forward_kl=.nan"], "not finite"),
        (["training.train_sampling_strategy=group_by_length"], "sequential"),
        (["loader.batch_size=0"], "at least 1"),
        (["training.per_device_train_batch_size=4"], "loader.batch_size"),
        (["student={prune: /nonexistent, layers: 2}"], "student.prune"),
        (["training.learning_rate=1e30", "training.max_grad_norm=0"], "diverged"),
        (["student.path=/nonexistent/student", "student.config=null"], "student.path"),
        (["losses.forward_kld=1"], "forward_kl"),
    ],
)
def test_what_cannot_work_is_refused(
    kdstore_cli: Run, config_file: Path, changes: list[str], words: str
) -> None:
    code, _, error = kdstore_cli("train", config_file, *changes, "--quiet")
    assert code in (1, 2)
    assert "kdstore: error:" in error
    assert "Traceback" not in error
    assert words in error


def test_layers_out_of_range_are_refused(
    kdstore_cli: Run, config_file: Path, teacher_dir: Path
) -> None:
    student = f"student={{prune: {teacher_dir}, layers: [0, 2]}}"
    code, _, error = kdstore_cli("train", config_file, student, "--quiet")
    assert code == 2
    assert "where: student.layers\n  expected: increasing numbers from 0 to 1" in error


def test_the_configuration_is_printed(kdstore_cli: Run, config_file: Path, tmp_path: Path) -> None:
    """Without store or student; what is printed is a configuration that prints the same."""
    changes = ["store=/nonexistent", "losses.ce=0.5"]
    code, printed, error = kdstore_cli("train", config_file, *changes, "--print-config")
    assert (code, error) == (0, "")
    found = yaml.safe_load(printed)
    assert (found["store"], found["seed"]) == ("/nonexistent", 0)
    assert found["losses"] == {"ce": 0.5}
    assert (found["loader"]["batch_size"], found["loader"]["streams"]) == (16, 64)
    (tmp_path / "again.yaml").write_text(printed)
    assert kdstore_cli("train", tmp_path / "again.yaml", "--print-config")[1] == printed
    assert not (tmp_path / "out").exists()


def test_a_dry_run_leaves_nothing(kdstore_cli: Run, config_file: Path, tmp_path: Path) -> None:
    code, output, error = kdstore_cli("train", config_file, "--dry-run", "--json", "--quiet")
    assert (code, error) == (0, "")
    found = json.loads(output)
    assert (found["num_samples"], found["steps_planned"]) == (60, 6)
    assert found["batch_shapes"][0][0] == 16
    code, output, _ = kdstore_cli("train", config_file, "--dry-run", "--quiet")
    rows, tokens = found["batch_shapes"][0]
    assert re.search(rf"^batch_shapes +{rows} × {tokens}$", output, flags=re.MULTILINE)
    assert re.search(rf"^parameters +{found['parameters']:,}$", output, flags=re.MULTILINE)
    assert not (tmp_path / "out").exists()


def test_only_one_thing_at_a_time(kdstore_cli: Run, config_file: Path) -> None:
    code, _, error = kdstore_cli("train", config_file, "--dry-run", "--resume")
    assert (code, "only one of --resume" in error) == (2, True)


def test_the_summary_is_a_table(kdstore_cli: Run, config_file: Path, tmp_path: Path) -> None:
    code, output, error = kdstore_cli("train", config_file, "training.logging_steps=1", "--quiet")
    assert (code, error) == (0, "")
    cells = dict(line.split("  ", 1) for line in output.splitlines())
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    first, last = metrics["losses"]["forward_kl"]
    assert cells["forward_kl"].strip() == f"{first:.4g} → {last:.4g}"
    assert cells["steps"].strip() == "6"
    assert cells["train_tokens"].strip() == f"{metrics['train_tokens']:,}"
    assert float(cells["eval_perplexity"]) > 1
    assert cells["student"].strip() == str(tmp_path / "out")
    assert cells["curves"].strip() == str(tmp_path / "out" / "curves.png")


def student_of(folder: Path, **changes: object) -> Path:
    import transformers

    kind = str(changes.pop("kind", "Llama"))
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    values = {"vocab_size": 384, "num_attention_heads": 4, "initializer_range": 0.5, **sizes}
    getattr(transformers, f"{kind}Config")(**{**values, **changes}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({"kind": "Bert"}, [], "sees the token"),
        ({"kind": "Bloom"}, ["loader={batch_tokens: 256, pack: true}"], "packed samples apart"),
        ({"max_position_embeddings": 16}, ["eval=null"], "longer than the student takes"),
        ({"vocab_size": 200}, [], "smaller than the store"),
    ],
)
def test_students_that_cannot_be_trained_on_the_store(
    kdstore_cli: Run,
    config_file: Path,
    tmp_path: Path,
    changes: dict[str, object],
    overrides: list[str],
    words: str,
) -> None:
    student = student_of(tmp_path / "student", **changes)
    code, _, error = kdstore_cli(
        "train", config_file, f"student.config={student}", *overrides, "--quiet"
    )
    assert code == 1, error
    assert words in error


def test_samples_come_in_the_order_that_reads_each_row_group_once(dump: Dump) -> None:
    store = kdstore.open(dump())
    sampler = EpochSampler(store, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) == list(range(60))
    assert first != list(sampler)
    again = EpochSampler(store, seed=3)
    assert list(again) == first
