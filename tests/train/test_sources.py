"""What a run is trained on: one store, several, mixtures, other teachers' of the same samples."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdstore
from kdstore.errors import SignalError, StoreMismatchError, StoreNotFoundError, UsageError
from kdstore.readers.concat import Concatenation
from kdstore.readers.join import Join
from kdstore.readers.mixture import Mixture
from kdstore.train.run import run_training
from kdstore.train.sources import describe_data, open_data, stores_of


@pytest.fixture
def topk(dump):
    """A store of the same samples with another selection."""
    return dump("topk", select="topk:k=3")


def digest(url):
    return kdstore.open(url).config_digest


def test_a_list_is_read_as_one(configured, rich_store):
    data = open_data(configured(f"store=[{rich_store}, {rich_store}]"))
    assert isinstance(data, Concatenation)
    found = describe_data(data)
    assert found["num_samples"] == 120
    assert found["num_tokens"] == 2 * sum(s.num_tokens for s in kdstore.open(rich_store))
    assert found["config_digest"] == "+".join([digest(rich_store)] * 2)
    assert found["store_complete"] is True


def test_a_mixture_has_its_weights(configured, rich_store, topk):
    members = f"mixture=[{{store: {rich_store}, weight: 3}}, {{store: [{topk}]}}]"
    data = open_data(configured("store=null", members))
    assert isinstance(data, Mixture)
    assert [part.samples_per_epoch for part in data.parts] == [90, 30]
    assert [s.config_digest for s in stores_of(data)] == [digest(rich_store), digest(topk)]
    assert describe_data(data)["num_samples"] == 120


def test_other_teachers_are_joined(configured, topk):
    data = open_data(configured(f"teachers={{second: {topk}}}"))
    assert isinstance(data, Join)
    sample, other = data[7], kdstore.open(topk)[7]
    assert sample.teachers["second"].sample_id == sample.sample_id == other.sample_id
    assert np.array_equal(sample.teachers["second"].signal.ids_N, other.signal.ids_N)
    assert describe_data(data)["num_samples"] == 60


def test_the_cache_is_passed_on(configured, tmp_path, monkeypatch):
    given = []
    opened = kdstore.open
    monkeypatch.setattr(
        kdstore, "open", lambda url, **options: given.append(options) or opened(url, **options)
    )
    open_data(configured(f"cache_dir={tmp_path}", "cache_bytes=1000000"))
    assert given == [{"cache_dir": str(tmp_path), "cache_bytes": 1_000_000}]


@pytest.fixture
def other_tokenizer(teacher_dir, tmp_path):
    """The teacher's weights with a tokenizer of one token more."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path / "other")
    AutoModelForCausalLM.from_pretrained(teacher_dir).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_stores_of_other_vocabularies_are_refused(configured, dump, other_tokenizer):
    one, other = dump("one"), dump("others", teacher=other_tokenizer)
    for change, message in (
        (f"store=[{one}, {other}]", "cannot be read as one: vocab_digest differs"),
        (f"teachers={{other: {other}}}", "joined have different vocabularies"),
    ):
        with pytest.raises(StoreMismatchError, match=message):
            open_data(configured(change))
    mixture = f"mixture=[{{store: {one}}}, {{store: {other}}}]"
    with pytest.raises(StoreMismatchError, match="mixture have different vocabularies"):
        open_data(configured("store=null", mixture))


def test_a_student_of_another_tokenizer_is_refused(configured, other_tokenizer):
    with pytest.raises(StoreMismatchError, match="other meanings to the store's token ids"):
        run_training(configured("student.config=null", f"student.path={other_tokenizer}"))


def test_a_store_without_samples_is_refused(
    configured, kdstore_cli, teacher_dir, data_file, tmp_path
):
    arguments = ["--teacher", teacher_dir, "--data", data_file, "--out", tmp_path / "plan"]
    assert kdstore_cli("dump", *arguments, "--plan-only", "--quiet")[0] == 0
    with pytest.raises(UsageError, match=r"no committed samples\n  where: .*plan"):
        open_data(configured(f"store={tmp_path / 'plan'}"))


def test_a_store_that_is_not_there(configured):
    with pytest.raises(StoreNotFoundError):
        open_data(configured("store=[nowhere]"))


def test_a_run_on_a_mixture(configured, rich_store, topk):
    members = f"mixture=[{{store: {rich_store}, weight: 2}}, {{store: {topk}}}]"
    metrics = run_training(configured("store=null", members), quiet=True)
    assert metrics["losses"]["ce"][1] < metrics["losses"]["ce"][0]
    resumed = run_training(configured("store=null", members, "training.max_steps=6"), resume=True)
    assert resumed["steps"] == 6
    with pytest.raises(StoreMismatchError, match="of another run: shares differs"):
        run_training(
            configured("store=null", members.replace("weight: 2", "weight: 4")), resume=True
        )


@pytest.mark.parametrize("pack", ["false", "true"])
def test_a_run_by_tokens(configured, pack):
    changes = ["loader={batch_tokens: 256}", f"loader.pack={pack}", "training.max_steps=8"]
    metrics = run_training(configured(*changes), quiet=True)
    assert 4 * 128 < metrics["train_tokens"] <= 8 * 256
    assert metrics["losses"]["ce"][1] < metrics["losses"]["ce"][0]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ("{jsd: 1.0}", "jsd of a drawn target is biased"),
        ("{policy_gradient: 1.0}", "needs the scalar behaviour_logprob"),
        ("{mine: {loss: forward_kl, teacher: other, temperature: 2.0}}", "--temperatures 2"),
        ("{forward_kl: {temperature: {start: 1.0, end: 2.0}}}", "drawn at another temperature"),
    ],
)
def test_signals_that_will_not_do_stop_before_anything_is_loaded(
    configured, topk, losses, message, monkeypatch
):
    monkeypatch.setattr("kdstore.train.prepare.build_student", None)
    config = configured("losses=null", f"losses={losses}", f"teachers={{other: {topk}}}")
    with pytest.raises((UsageError, SignalError), match=message):
        run_training(config)
