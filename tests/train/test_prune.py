"""Pruned students: which layers are kept, and that nothing but their number is new to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2MoeConfig, Qwen3Config

from kdstore.errors import UsageError
from kdstore.train.prune import pick_layers, prune_layers
from kdstore.train.run import run_training

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def model_of(config: object) -> object:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def qwen() -> object:
    """Three layers of full attention, then three that see four tokens."""
    config = Qwen3Config(
        **SIZES, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=3
    )
    return model_of(config)


@pytest.mark.parametrize(
    ("layers", "total", "kept"),
    [
        (3, 12, [0, 6, 11]),  # Shleifer and Rush, 2020
        (6, 12, [0, 2, 4, 7, 9, 11]),
        (2, 28, [0, 27]),
        (1, 5, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
        ([0, 3, 7], 8, [0, 3, 7]),
        ([4], 8, [4]),
    ],
)
def test_layers_that_are_kept(layers: object, total: int, kept: list[int]) -> None:
    assert pick_layers(layers, total) == kept


@pytest.mark.parametrize("layers", [0, -1, 7, [], [0, 6], [-1], [2, 1], [1, 1]])
def test_layers_that_there_are_not(layers: object) -> None:
    expected = "1 to 6" if isinstance(layers, int) else r"increasing numbers from 0 to 5"
    with pytest.raises(UsageError, match=rf"student.layers\n  expected: {expected}"):
        pick_layers(layers, 6)


@pytest.mark.parametrize("make", [qwen, lambda: model_of(LlamaConfig(**SIZES))])
def test_a_pruned_model_is_saved_and_loaded_as_it_is(make: object, tmp_path: Path) -> None:
    teacher = make()
    pruned = prune_layers(teacher, [0, 3, 5]).eval()
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(pruned(ids).logits, loaded(ids).logits)
        assert torch.equal(loaded(ids).logits, by_hand(teacher, [0, 3, 5], ids))
    # Layers address the cache by their numbers.
    assert [layer.self_attn.layer_idx for layer in loaded.model.layers] == [0, 1, 2]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = loaded.generate(ids, use_cache=True, **options)
    assert cached.shape == (1, 28)
    assert torch.equal(cached, loaded.generate(ids, use_cache=False, **options))


def by_hand(teacher: torch.nn.Module, kept: list[int], ids: torch.Tensor) -> torch.Tensor:
    """Logits of the teacher, whose other layers hand on what they are given."""
    handles = [
        layer.register_forward_hook(lambda module, args, output: args[0])
        for number, layer in enumerate(teacher.model.layers)
        if number not in kept
    ]
    logits = teacher(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def test_lists_of_layers_in_the_configuration_are_cut_alike() -> None:
    full, sliding = "full_attention", "sliding_attention"
    assert qwen().config.layer_types == [full] * 3 + [sliding] * 3
    assert prune_layers(qwen(), [0, 3, 5]).config.layer_types == [full, sliding, sliding]
    assert prune_layers(qwen(), 3).config.num_hidden_layers == 3


def test_token_ids_are_no_layers() -> None:
    teacher = model_of(LlamaConfig(**{**SIZES, "eos_token_id": [1, 2, 3, 4, 5, 6]}))
    assert prune_layers(teacher, 2).config.eos_token_id == [1, 2, 3, 4, 5, 6]


def test_an_architecture_that_goes_by_the_number_of_a_layer_is_refused() -> None:
    experts = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    teacher = model_of(Qwen2MoeConfig(**SIZES, **experts, mlp_only_layers=[1]))
    with pytest.raises(UsageError, match="says what a layer is by its number"):
        prune_layers(teacher, [0, 3, 5])


def test_layers_that_cannot_be_told_are_refused() -> None:
    teacher = model_of(LlamaConfig(**SIZES))
    teacher.others = torch.nn.ModuleList(torch.nn.Identity() for _ in range(6))
    with pytest.raises(UsageError, match=r"cannot be told\n.*\n.*\n  got: model.layers, others"):
        prune_layers(teacher, 2)


def test_a_run_of_a_pruned_teacher(configured, teacher_dir: Path, tmp_path: Path) -> None:
    """It begins better than a new student of its size, and its folder is a model and tokenizer."""
    student = ["student.config=null", f"student.prune={teacher_dir}", "student.layers=1"]
    metrics = run_training(configured(*student), quiet=True)
    new = tmp_path / "new"
    config = AutoModelForCausalLM.from_pretrained(metrics["student"]).config
    assert config.num_hidden_layers == 1
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    config.save_pretrained(new)
    fresh = run_training(configured(f"student.config={new}"), quiet=True)
    assert metrics["losses"]["forward_kl"][0] < fresh["losses"]["forward_kl"][0] - 1
