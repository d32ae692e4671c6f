"""The training configuration: what is read, and what a user is told when it is wrong."""

from __future__ import annotations

import pytest

from kdstore.errors import UsageError
from kdstore.readers.batches import BatchConfig
from kdstore.train.config import (
    EvalConfig,
    LoraConfig,
    MemberConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    load_config,
    print_config,
)

FULL = """
store: build/store
student: {config: examples/student}
losses: {forward_kl: 1.0, ce: 0.25}
loader: {batch_tokens: 4096, pack: true, overlong: skip}
teachers: {second: build/second}
cache_dir: build/cache
cache_bytes: 1_000_000
freeze: ["model.embed_tokens.*"]
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
        loader=BatchConfig(batch_tokens=4096, pack=True, overlong="skip"),
        teachers={"second": "build/second"},
        cache_dir="build/cache",
        cache_bytes=1_000_000,
        freeze=["model.embed_tokens.*"],
        eval=EvalConfig(data="heldout.jsonl", batch_size=4, max_length=512),
        training=training,
        seed=3,
    )


def test_defaults(write):
    config = load_config(write("{store: s, student: {path: m}, training: {output_dir: o}}"))
    assert config.losses == {"forward_kl": 1.0}
    assert (config.loader, config.eval, config.seed) == (BatchConfig(batch_size=8), None, 0)
    assert config.training["report_to"] == "none"
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
        (
            "training.seed=1",
            r"training.seed .*\n  where: training\n.*\n  got: 1\n  to do: set `seed` at the top",
        ),
        ("seed=1.5", r"seed has the wrong type\n  expected: int\n  got: 1.5 \(float\)"),
        ("pack=true", r"unknown key 'pack'"),
        ("loader.pack=yes please", r"loader.pack has the wrong type\n  expected: bool"),
        ("loader.pak=true", r"unknown key 'loader.pak'\n.*did you mean 'loader.pack'"),
        ("loader.batch_size=4", "a loader needs one of batch_tokens and batch_size"),
        ("loader={pack: true}", r"batch_size counts packs, .*\n  to do: set max_length"),
        ("loader.overlong=drop", r"expected: 'error' or 'skip' or 'truncate' or 'split'"),
        (
            "loader.seed=1",
            r"loader.seed is not yours to set\n  where: loader\n  expected: no seed\n  got: 1\n"
            "  to do: set `seed` at the top level",
        ),
        ("loader.shuffle=false", r"to do: set `training.train_sampling_strategy`"),
        ("training.per_device_train_batch_size=4", r"to do: set `loader.batch_size`"),
        ("store=null", "exactly one of store, mixture and teacher"),
        ("store=[]", "no stores to read"),
        ("store=[1]", r"store has the wrong type\n  expected: str or a list of str or null"),
        ("mixture=[{store: a}]", "exactly one of store, mixture and teacher"),
        ("teachers={second: 1}", "teachers has the wrong type"),
        ("cache_bytes=1.5", r"cache_bytes has the wrong type\n  expected: int"),
        ("student.layers=2", "student.prune and student.layers, or neither"),
        ("student={prune: t}", "student.prune and student.layers, or neither"),
        (
            "student={prune: t, layers: [0, x]}",
            r"student.layers .*\n  expected: int or a list of int",
        ),
        ("freeze=lm_head", r"freeze has the wrong type\n  expected: a list of str"),
        ("lora={r: 0}", r"no rank\n  where: lora.r"),
        ("lora={dropout: 1}", r"no probability\n  where: lora.dropout"),
        ("lora={rank: 8}", "unknown key 'lora.rank'"),
        ("lora={}", "lora freezes everything but its adapters already"),
        ("losses.ce=true", r"losses.ce.weight has the wrong type"),
        ("losses=null", r"losses has the wrong type"),
        ("student.dtype=float8", r"expected: 'float32' or 'bfloat16' or 'float16'"),
        ("student.path=x", r"exactly one of student.path, student.config and"),
        ("student.config=null", r"exactly one of student.path, student.config and"),
        ("student=model", r"student .*\n  expected: a mapping with the keys path, config, prune"),
        ("eval.data=null", r"exactly one of eval.data and eval.store"),
        ("eval={store: s, score: all}", "cut and scored when it was dumped"),
        ("eval={store: s, max_samples: 0}", "where: eval.max_samples"),
        ("eval.data=[1]", r"eval.data has the wrong type\n  expected: str"),
        ("weights={kinds: {user: -1}}", "a token weight is zero or more"),
        ("weights={entropi: []}", "did you mean 'weights.entropy'"),
        ("seed.inner=1", r"'seed' has no keys inside"),
        ("seed", r"not an override\n  where: command line\n  expected: key=value"),
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
        (
            "{student: {path: m}, training: {output_dir: o}}",
            "exactly one of store, mixture and teacher",
        ),
        ("{store: s, training: {output_dir: o}}", "missing key.*\n.*\n  expected: student"),
    ],
)
def test_wrong_files(write, text, message):
    with pytest.raises(UsageError, match=message):
        load_config(write(text))


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the configuration\n  where: .*none.yaml"):
        load_config(tmp_path / "none.yaml")


def test_a_mixture(write):
    text = "{mixture: [{store: a, weight: 2.5}, {store: [b, c]}], student: {path: m}, "
    config = load_config(write(text + "training: {output_dir: o}}"))
    assert config.store is None
    members = [MemberConfig(store="a", weight=2.5), MemberConfig(store=["b", "c"], weight=1.0)]
    assert config.mixture == members


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("[{stor: a}]", r"unknown key 'mixture\[0\].stor'\n.*did you mean 'mixture\[0\].store'"),
        ("[{store: a}, {weight: 1}]", r"missing key\n  where: mixture\[1\]\n  expected: store"),
        (
            "[{store: a}, b]",
            r"mixture\[1\] has the wrong type\n  expected: a mapping with the keys",
        ),
        ("{store: a}", "mixture has the wrong type"),
        ("[]", "no stores to read"),
        ("[{store: a}]\nteachers: {b: c}", "other teachers are joined to one store"),
    ],
)
def test_wrong_mixtures(write, mixture, message):
    text = f"mixture: {mixture}\nstudent: {{path: m}}\ntraining: {{output_dir: o}}\n"
    with pytest.raises(UsageError, match=message):
        load_config(write(text))


def test_adapters_need_a_saved_student(write):
    text = "{store: s, student: {path: m}, lora: {r: 8, target_modules: [q]}, "
    config = load_config(write(text + "training: {output_dir: o}}"))
    assert config.lora == LoraConfig(r=8, target_modules=["q"])
    for student in ("{config: m}", "{prune: m, layers: 2}"):
        with pytest.raises(UsageError, match=r"expected: student.path\n  got: student\.[cp]"):
            load_config(write(text + "training: {output_dir: o}}"), [f"student={student}"])


def test_what_is_printed_loads_to_the_same(write):
    overrides = ["losses.ce=1e-5", "store=[a, '1e-3', 's3://b/ü: x']", "training.bf16=true"]
    config = load_config(write(FULL), overrides)
    printed = print_config(config)
    assert load_config(write(printed)) == config
    assert config.store == ["a", "1e-3", "s3://b/ü: x"]
    for line in ("  overlong: skip", "  streams: 64", "  report_to: none", "  dtype: float32"):
        assert line in printed.splitlines()


def test_a_teacher_has_an_order_of_its_own(write):
    """Few units are begun at once, unless the configuration says otherwise; it prints back."""
    text = "{teacher: {path: t, data: d}, student: {path: m}, training: {output_dir: o}}"
    config = load_config(write(text), ["teacher.temperatures=[1.5, 2]"])
    assert config.teacher == TeacherConfig(path="t", data="d", temperatures=[1.5, 2])
    assert config.loader == BatchConfig(batch_size=8, streams=8, shards_at_once=1)
    assert load_config(write(print_config(config))) == config
    chosen = load_config(write(text), ["loader={batch_tokens: 64, streams: 2}"]).loader
    assert chosen == BatchConfig(batch_tokens=64, streams=2, shards_at_once=1)
