"""The hf teacher gives what each model's own forward gives, whatever its head does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kdstore.errors import TeacherError, UsageError
from kdstore.sample import Sample
from kdstore.select import parse_selection
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


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_the_models_own_forward(name: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher, samples = teacher_at(folder, batch_tokens=80), some_samples()
    answers = dict(teacher.score(samples, parse_selection("full")))
    assert set(answers) == {"s0", "s1", "s2", "s4"}
    for sample in samples:
        if sample.num_scored:
            with torch.no_grad():
                logits = model(torch.from_numpy(sample.input_ids_T)[None].long()).logits[0]
            want = logits[sample.positions_S - 1].double().softmax(-1)
            got = torch.from_numpy(answers[sample.sample_id].to_dense(V))
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-3)


def test_head_in_small_chunks_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_at(saved_model(tmp_path, "Llama"))
    whole = dict(teacher.score(some_samples(), parse_selection("topk:k=5")))
    monkeypatch.setattr(hf, "HEAD_ELEMENTS", 3 * V)
    parts = dict(teacher.score(some_samples(), parse_selection("topk:k=5")))
    for name, signal in whole.items():
        np.testing.assert_array_equal(signal.ids_N, parts[name].ids_N)
        np.testing.assert_allclose(signal.logprobs_N, parts[name].logprobs_N, atol=1e-5)


def test_vocabulary_padding_is_left_out_and_reported(tmp_path: Path) -> None:
    teacher = teacher_at(saved_model(tmp_path, "Llama"), num_ids=90)
    answers = dict(teacher.score(some_samples(), parse_selection("full")))
    assert max(int(signal.ids_N.max()) for signal in answers.values()) == 89
    assert 0 < teacher.provenance()["padding_mass"] < 1


def test_bfloat16_is_recorded_and_works(tmp_path: Path) -> None:
    info = describe_checkpoint(saved_model(tmp_path, "Llama"), dtype="bf16", device="cpu")
    assert info.identity["logits_dtype"] == "bfloat16"
    answers = dict(HFTeacher(info, device="cpu").score(some_samples(), parse_selection("full")))
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
