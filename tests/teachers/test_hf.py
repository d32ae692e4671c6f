"""The hf teacher gives what each model's own forward gives, whatever its head does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kdstore.audit import audited_rows
from kdstore.errors import TeacherError, UsageError
from kdstore.hashing import RowKeys
from kdstore.sample import Sample
from kdstore.select import parse_selection
from kdstore.signal import SparseSignal
from kdstore.teacher import Score
from kdstore.teachers import hf
from kdstore.teachers.hf import HFTeacher, length_batches
from kdstore.teachers.hf_load import describe_checkpoint

V = 96
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SMALL,
    "Qwen2": {**SMALL, "tie_word_embeddings": True},
    "Gemma2": {**SMALL, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 8},
    "Cohere": {**SMALL, "logit_scale": 0.25},
    "Granite": {**SMALL, "logits_scaling": 4.0},
    "Mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT2": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def saved_model(folder: Path, name: str) -> Path:
    config = getattr(transformers, f"{name}Config")(
        **MODELS[name], bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def teacher_at(folder: Path, **options: Any) -> HFTeacher:
    return HFTeacher(describe_checkpoint(folder, device="cpu"), device="cpu", **options)


def some_samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    lengths = [5, 40, 17, 2, 33]
    runs = [((1, 5),), ((3, 9), (20, 40)), ((16, 17),), (), ((1, 33),)]
    return [
        Sample(f"s{i}", generator.integers(3, V, n).astype(np.int32), runs=r)
        for i, (n, r) in enumerate(zip(lengths, runs, strict=True))
    ]


def signals_of(scores: Iterable[Score]) -> dict[str, SparseSignal]:
    return {score.sample_id: score.signal for score in scores}


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_the_models_own_forward(name: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher, samples = teacher_at(folder, batch_tokens=80), some_samples()
    answers = signals_of(teacher.score(samples, parse_selection("full")))
    assert set(answers) == {"s0", "s1", "s2", "s4"}
    for sample in samples:
        if sample.num_scored:
            with torch.no_grad():
                logits = model(torch.from_numpy(sample.input_ids_T)[None].long()).logits[0]
            want = logits[sample.positions_S - 1].double().softmax(-1)
            got = torch.from_numpy(answers[sample.sample_id].to_dense(V))
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("batch_tokens", [1, 80, 16_384])
def test_audits_are_of_the_audited_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    """Each sample gets its own, however batches and chunks of the head are cut."""
    monkeypatch.setattr(hf, "head_rows", lambda *_: 7)
    teacher, samples = (
        teacher_at(saved_model(tmp_path, "Llama"), batch_tokens=batch_tokens),
        some_samples(),
    )
    whole = signals_of(teacher.score(samples, parse_selection("full"), seed=4))
    scores = list(teacher.score(samples, parse_selection("topk:k=3"), seed=4, audit_fraction=0.4))
    by_id = {sample.sample_id: sample for sample in samples}
    assert sum(len(score.audit) for score in scores) > 15
    for score in scores:
        sample = by_id[score.sample_id]
        keys = RowKeys.of_samples([(sample.sample_id, sample.positions_S)], seed=4)
        want = whole[score.sample_id][audited_rows(keys, fraction=0.4)]
        assert (score.audit.selection, dict(score.audit.scalars)) == ("full", {})
        np.testing.assert_array_equal(score.audit.ids_N, want.ids_N)
        np.testing.assert_array_equal(score.audit.logprobs_N, want.logprobs_N)
        assert len(score.signal) == sample.num_scored


def test_head_in_small_chunks_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_at(saved_model(tmp_path, "Llama"))
    whole = signals_of(teacher.score(some_samples(), parse_selection("topk:k=5")))
    monkeypatch.setattr(hf, "head_rows", lambda *_: 3)
    parts = signals_of(teacher.score(some_samples(), parse_selection("topk:k=5")))
    for name, signal in whole.items():
        np.testing.assert_array_equal(signal.ids_N, parts[name].ids_N)
        np.testing.assert_allclose(signal.logprobs_N, parts[name].logprobs_N, atol=1e-5)


def test_vocabulary_padding_is_left_out_and_reported(tmp_path: Path) -> None:
    teacher = teacher_at(saved_model(tmp_path, "Llama"), num_ids=90)
    answers = signals_of(teacher.score(some_samples(), parse_selection("full")))
    assert max(int(signal.ids_N.max()) for signal in answers.values()) == 89
    assert 0 < teacher.provenance()["padding_mass"] < 1


def test_bfloat16_is_recorded_and_works(tmp_path: Path) -> None:
    info = describe_checkpoint(saved_model(tmp_path, "Llama"), dtype="bf16", device="cpu")
    assert info.identity["logits_dtype"] == "bfloat16"
    answers = signals_of(
        HFTeacher(info, device="cpu").score(some_samples(), parse_selection("full"))
    )
    np.testing.assert_allclose(answers["s4"].kept_mass_S, 1, atol=1e-5)


def test_batches_are_bounded_and_hold_every_scored_sample_once() -> None:
    samples = some_samples()
    batches = list(length_batches(samples, batch_tokens=70))
    assert sorted(s.sample_id for batch in batches for s in batch) == ["s0", "s1", "s2", "s4"]
    assert all(len(b) * b[0].num_tokens <= 70 for b in batches if len(b) > 1)
    assert len(list(length_batches(samples, batch_tokens=1))) == 4


def test_a_config_that_lies_about_its_width_is_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "Llama")
    info = describe_checkpoint(folder, device="cpu")
    wrong = type(info)(**{**vars(info), "vocab_size": V + 1})
    with pytest.raises(TeacherError, match=f"vocab_size {V + 1}"):
        HFTeacher(wrong, device="cpu")


def test_another_checkpoint_of_the_same_name_has_another_revision(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "teacher", "Llama")
    before = describe_checkpoint(folder, device="cpu").revision
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    model.save_pretrained(folder)
    assert describe_checkpoint(folder, device="cpu").revision != before


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        describe_checkpoint(saved_model(tmp_path, "Llama"), dtype="int4", device="cpu")


def edit_weights(folder: Path, change: Any) -> None:
    """Rewrite a checkpoint's tensors with ``change(name, tensor)``; None drops a tensor."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "Llama")
    edit_weights(folder, lambda name, tensor: None if name == "lm_head.weight" else tensor)
    with pytest.raises(TeacherError, match=r"lm_head\.weight"):
        teacher_at(folder)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "Llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TeacherError, match="cannot load"):
        teacher_at(folder)


@pytest.mark.parametrize(
    "part", ["layers.1.mlp.down_proj", "layers.0.self_attn.q_proj", "model.norm"]
)
def test_one_changed_tensor_changes_the_revision(tmp_path: Path, part: str) -> None:
    folder = saved_model(tmp_path, "Llama")
    before = describe_checkpoint(folder, device="cpu").revision
    edit_weights(folder, lambda name, tensor: tensor * 1.01 if part in name else tensor)
    assert describe_checkpoint(folder, device="cpu").revision != before


def saved_with_rope(folder: Path, **rope: Any) -> Path:
    rope |= {"rope_theta": 10_000.0, "original_max_position_embeddings": 16}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, rope_parameters=rope)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_longrope_batches_only_equal_lengths(tmp_path: Path) -> None:
    """Its rotary factors follow the longest row of a batch."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    folder = saved_with_rope(tmp_path, rope_type="longrope", factor=4.0, **factors)
    together = signals_of(teacher_at(folder).score(some_samples(), parse_selection("full")))
    for sample in some_samples():
        if sample.num_scored:
            alone = signals_of(teacher_at(folder).score([sample], parse_selection("full")))
            np.testing.assert_allclose(
                together[sample.sample_id].to_dense(V),
                alone[sample.sample_id].to_dense(V),
                atol=1e-5,
            )


def test_dynamic_rope_is_not_taken_beyond_its_original_length(tmp_path: Path) -> None:
    """Beyond it, transformers lets a row's factors depend on the rows that came before."""
    folder = saved_with_rope(tmp_path, rope_type="dynamic", factor=4.0)
    assert describe_checkpoint(folder, device="cpu").max_length == 16
    with pytest.raises(TeacherError, match="longer than the teacher takes"):
        list(teacher_at(folder).score(some_samples(), parse_selection("full")))


def test_a_model_that_sees_the_label_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="not causal"):
        teacher_at(tmp_path)


def test_a_head_that_cannot_be_split_off_is_refused(tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=32,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="apart from its body"):
        teacher_at(tmp_path)
