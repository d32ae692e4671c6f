"""The training configuration: what is read, and what a user is told when it is wrong."""

from __future__ import annotations

import pytest

from kdstore.errors import UsageError
from kdstore.train.config import EvalConfig, StudentConfig, TrainConfig, load_config

FULL = """
store: build/store
student: {config: examples/student}
losses: {forward_kl: 1.0, ce: 0.25}
pack: true
eval: {data: heldout.jsonl, batch_size: 4, max_length: 512}
training:
  output_dir: build/out
  learning_rate: 1e-3
  max_steps: 20
  lr_scheduler_type: cosine
seed: 3
"""


@pytest.fixture
def write(tmp_path):
    """Write a YAML text to a file, give its path."""

    def write_text(text: str):
        path = tmp_path / "train.yaml"
        path.write_text(text)
        return path

    return write_text


def test_reads_every_key(write):
    training = {
        "output_dir": "build/out",
        "learning_rate": 0.001,
        "max_steps": 20,
        "lr_scheduler_type": "cosine",
    }
    assert load_config(write(FULL)) == TrainConfig(
        store="build/store",
        student=StudentConfig(config="examples/student"),
        losses={"forward_kl": 1.0, "ce": 0.25},
        pack=True,
        eval=EvalConfig(data="heldout.jsonl", batch_size=4, max_length=512),
        training=training,
        seed=3,
    )


def test_defaults(write):
    config = load_config(write("{store: s, student: {path: m}, training: {output_dir: o}}"))
    assert config.losses == {"forward_kl": 1.0}
    assert (config.pack, config.eval, config.seed) == (False, None, 0)
    assert str(config.output_dir) == "o"


def test_overrides(write):
    overrides = [
        "losses.ce=2e-1",
        "student.config=null",
        "student.path=other=model",
        "eval=null",
        "training.gradient_accumulation_steps=4",
    ]
    config = load_config(write(FULL), overrides)
    assert config.losses["ce"] == 0.2
    assert config.student == StudentConfig(path="other=model")
    assert config.eval is None
    assert config.training["gradient_accumulation_steps"] == 4


def test_overrides_make_what_is_missing(write):
    text = "{store: s, student: {path: m}, training: {output_dir: o}, eval: null}"
    assert load_config(write(text), ["eval.data=x.jsonl"]).eval == EvalConfig(data="x.jsonl")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studnt.path=x", r"unknown key 'studnt'\n.*did you mean 'student'"),
        ("student.dtpe=x", r"unknown key 'student.dtpe'\n.*did you mean 'student.dtype'"),
        ("losses.forward_lk=1", r"'losses.forward_lk'\n.*did you mean 'losses.forward_kl'"),
        ("losses.zzz=1", r"unknown key 'losses.zzz'\n  expected: ce, forward_kl"),
        ("training.learning_rat=1", r"did you mean 'training.learning_rate'"),
        ("training.max_steps=many", r"training.max_steps has .*\n  expected: int\n  got: 'many'"),
        ("training.learning_rate=fast", r"training.learning_rate .*\n  expected: float"),
        (
            "training.bf16=1",
            r"training.bf16 has the wrong type\n  expected: bool\n  got: 1 \(int\)",
        ),
        ("training.output_dir=null", r"missing key\n  where: training\n  expected: output_dir"),
        ("training.seed=1", r"training.seed .*\n  to do: set `seed` at the top level"),
        ("seed=1.5", r"seed has the wrong type\n  expected: int\n  got: 1.5 \(float\)"),
        ("pack=yes please", r"pack has the wrong type\n  expected: bool"),
        ("losses.ce=true", r"losses has the wrong type"),
        ("losses=null", r"losses has the wrong type"),
        ("student.dtype=float8", r"expected: 'float32' or 'bfloat16' or 'float16'"),
        ("student.path=x", r"exactly one of student.path and student.config"),
        ("student.config=null", r"exactly one of student.path and student.config"),
        ("student=model", r"student .*\n  expected: a mapping with the keys path, config, dtype"),
        ("eval.data=null", r"eval.data has the wrong type\n  expected: str"),
        ("seed.inner=1", r"'seed' has no keys inside"),
        ("seed", r"not an override\n  expected: key=value"),
        ("seed=[1", r"not valid YAML"),
    ],
)
def test_mistakes_are_named(write, override, message):
    with pytest.raises(UsageError, match=message):
        load_config(write(FULL), [override])


def test_no_loss_is_refused(write):
    with pytest.raises(UsageError, match="no loss to train on"):
        load_config(write(FULL), ["losses.forward_kl=0", "losses.ce=0.0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "a configuration is a mapping"),
        ("", "a configuration is a mapping"),
        ("a: [", "not valid YAML"),
        ("{student: {path: m}, training: {output_dir: o}}", "missing key.*\n.*\n  expected: store"),
        ("{store: s, training: {output_dir: o}}", "missing key.*\n.*\n  expected: student"),
    ],
)
def test_wrong_files(write, text, message):
    with pytest.raises(UsageError, match=message):
        load_config(write(text))


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the configuration\n  where: .*none.yaml"):
        load_config(tmp_path / "none.yaml")
