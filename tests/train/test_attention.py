"""varlen_sdpa: packed samples alone, padded rows and caches as sdpa has them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from kdstore.errors import UsageError
from kdstore.readers.collate import Collator
from kdstore.train.attention import VARLEN_SDPA, register_varlen_sdpa, takes_lengths
from tests.train.test_distill_head import SHAPE
from tests.train.test_losses import topk_sample
from tests.train.train_helpers import ragged_samples

SHAPE = {**SHAPE, "num_hidden_layers": 2, "num_key_value_heads": 1}
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


def test_takes_lengths():
    eager, ours = models(CONFIGS["plain"])
    assert (takes_lengths(eager), takes_lengths(ours)) == (False, True)
