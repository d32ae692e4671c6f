"""varlen_sdpa: packed samples alone, padded rows and caches as sdpa has them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Gemma2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MoshiConfig,
    PersimmonConfig,
    Qwen2MoeConfig,
)

from kdstore.errors import UsageError
from kdstore.readers.collate import Collator
from kdstore.train.attention import VARLEN_SDPA, register_varlen_sdpa, takes_lengths
from kdstore.train.student import check_architecture
from tests.train.test_distill_head import SHAPE
from tests.train.test_losses import topk_sample
from tests.train.train_helpers import ragged_samples

SHAPE = {**SHAPE, "num_hidden_layers": 2, "num_key_value_heads": 1}
WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
CHUNKS = {
    "attention_chunk_size": 4,
    "head_dim": 8,
    "num_local_experts": 2,
    "intermediate_size_mlp": 16,
    "layer_types": ["chunked_attention", "full_attention"],
}
CONFIGS = {"plain": LlamaConfig(**SHAPE), "windows": MistralConfig(**SHAPE, sliding_window=4)}


@pytest.fixture(autouse=True)
def registered() -> None:
    register_varlen_sdpa()


def models(config: Any) -> tuple[Any, Any]:
    """The same weights with the eager attention and with ours."""
    made = []
    for attention in ("eager", VARLEN_SDPA):
        torch.manual_seed(0)
        config = deepcopy(config)
        made.append(AutoModelForCausalLM.from_config(config, attn_implementation=attention))
    return made[0], made[1]


def logits_of(model: Any, samples: list[Any], *, varlen: bool = False, **collator: Any) -> Any:
    """At the scored positions, [S, V]."""
    batch = Collator(**collator)(samples)
    logits = model(**batch.model_inputs(varlen=varlen)).logits
    return logits.view(-1, logits.shape[-1])[batch.logit_rows_S]


@pytest.mark.parametrize("varlen", [True, False], ids=["by lengths", "by positions"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_samples_are_answered_as_each_alone(name, varlen):
    """Values and gradients; one row with padding behind the samples, whose length is odd."""
    eager, ours = models(CONFIGS[name])
    samples = [topk_sample(sample) for sample in ragged_samples(7)]
    alone = logits_of(eager, samples)
    packed = logits_of(ours, samples, varlen=varlen, pack=True, max_length=97)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    for logits in (alone, packed):
        logits.square().mean().backward()
    for one, other in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_padded_rows_and_caches():
    eager, ours = models(CONFIGS["plain"])
    samples = [topk_sample(sample) for sample in ragged_samples(7)]
    torch.testing.assert_close(
        logits_of(ours, samples), logits_of(eager, samples), rtol=1e-4, atol=1e-5
    )
    prompt = torch.tensor([[1, 2, 3]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    assert ours.generate(prompt, **options).tolist() == eager.generate(prompt, **options).tolist()


def test_no_mask_of_all_pairs_is_made():
    """The memory of a row is that of its samples: no tensor has two dimensions of its length."""
    from tests.train.test_distill_head import Largest

    _, ours = models(CONFIGS["plain"])
    samples = [topk_sample(sample) for sample in ragged_samples(7)]
    with Largest() as seen:
        logits_of(ours, samples, varlen=True, pack=True, max_length=97)
    assert not [shape for shape in seen.shapes if shape.count(97) > 1]
    assert [shape for shape in seen.shapes if shape.count(97) == 1]


def test_what_it_does_not_do_is_refused():
    config = Gemma2Config(**SHAPE, head_dim=8, attn_logit_softcapping=5.0)
    _, ours = models(config)
    with pytest.raises(UsageError, match="varlen_sdpa does not do softcap"):
        ours(input_ids=torch.tensor([[1, 2]]))


REFUSED = {
    # Their masks say what their attention is not told: a window, chunks, where samples begin.
    "window": (Qwen2MoeConfig(**SHAPE, **WINDOW, **EXPERTS), "how far the layer sees"),
    "chunks": (Llama4TextConfig(**SHAPE, **CHUNKS), "how far the layer sees"),
    "lengths": (MoshiConfig(**SHAPE), "where samples begin"),
    "own mask": (DogeConfig(**SHAPE), "a mask or lengths"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_rely_on_their_mask_are_refused(name):
    """Otherwise samples would see each other, or too far, in silence."""
    config, message = REFUSED[name]
    eager, ours = models(config)
    samples = [topk_sample(sample) for sample in ragged_samples(7)]
    padded = [logits_of(model, samples) for model in (ours, eager)]
    torch.testing.assert_close(*padded, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=message):
        logits_of(ours, samples, varlen=True, pack=True)


def test_a_window_that_no_sample_is_longer_than_is_not_needed():
    eager, ours = models(Qwen2MoeConfig(**SHAPE, **{**WINDOW, "sliding_window": 16}, **EXPERTS))
    samples = [topk_sample(sample) for sample in ragged_samples(7)]
    packed = logits_of(ours, samples, varlen=True, pack=True)
    torch.testing.assert_close(packed, logits_of(eager, samples), rtol=1e-4, atol=1e-5)


def test_lengths_are_enough():
    """A model that keeps the positions to itself; full rows of a batch with a mask need neither."""
    eager, ours = models(PersimmonConfig(**{**SHAPE, "num_key_value_heads": 2}))
    samples = [topk_sample(sample) for sample in ragged_samples(7)]
    alone = logits_of(eager, samples)
    packed = logits_of(ours, samples, varlen=True, pack=True)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    one = [logits_of(model, samples[:1]) for model in (ours, eager)]
    torch.testing.assert_close(*one, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="where samples begin"):
        logits_of(ours, samples, pack=True)


def test_going_on_from_a_cache_without_a_mask():
    """Several tokens at once see all of the cache and, of each other, those before them."""
    eager, ours = models(CONFIGS["plain"])
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    cache = ours(input_ids=tokens[:, :3], use_cache=True).past_key_values
    later = ours(input_ids=tokens[:, 3:], past_key_values=cache, use_cache=True).logits
    expected = eager(input_ids=tokens, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(later, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "apart"), [("plain", True), ("lengths", False)])
def test_the_probe_of_a_student_takes_its_own_attention(name, apart):
    """With eager attention, which transformers' masks are for, all of them would pass."""
    config = CONFIGS[name] if apart else REFUSED[name][0]
    _, ours = models(config)
    if apart:
        check_architecture(ours, pack=True)
    else:
        with pytest.raises(UsageError, match=REFUSED[name][1]):
            check_architecture(ours, pack=True)
    check_architecture(ours, pack=False)
    assert ours.config._attn_implementation == VARLEN_SDPA


def test_gradient_checkpointing():
    eager, ours = models(CONFIGS["windows"])
    samples = [topk_sample(sample) for sample in ragged_samples(7)]
    ours.train().gradient_checkpointing_enable()
    packed = logits_of(ours, samples, varlen=True, pack=True, max_length=97)
    for logits in (logits_of(eager, samples), packed):
        logits.square().mean().backward()
    for one, other in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_takes_lengths():
    eager, ours = models(CONFIGS["plain"])
    assert (takes_lengths(eager), takes_lengths(ours)) == (False, True)
