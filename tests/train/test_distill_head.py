"""DistillHead against the same losses on materialised logits, on architectures that differ."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
)

from kdstore.errors import SignalError
from kdstore.readers.collate import Batch, Collator
from kdstore.signal import SparseSignal
from kdstore.train.head import DistillHead, Request, auxiliary_loss
from kdstore.train.logit_map import LogitMap
from kdstore.train.objective import Objective
from tests.train.dense_losses import ALL
from tests.train.test_losses import topk_sample
from tests.train.train_helpers import V, one_sample_batch, ragged_samples, tiny_model

WIDTH = 16
SHAPE = {
    "vocab_size": V,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "softcap": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0),
    "scale": CohereConfig(**SHAPE, logit_scale=0.0625),
    "divisor": GraniteConfig(**SHAPE, logits_scaling=3.0),
    "bias": PhiConfig(**SHAPE),
    "experts": MixtralConfig(**SHAPE, num_local_experts=2, output_router_logits=True),
}
MAPS = {
    "softcap": LogitMap(1.0, 3.0),
    "scale": LogitMap(0.0625),
    "divisor": LogitMap(pytest.approx(1 / 3)),
}
OBJECTIVE = {"forward_kl": 1.0, "ce": {"weight": 0.3}, "jsd": {"temperature": 1.0, "weight": 0.5}}


def make_model(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), attn_implementation="eager")
    if name == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    return model.to(dtype)


def make_batch(*, pack: bool = False, count: int = 6) -> Batch:
    return Collator(pack=pack)([topk_sample(sample) for sample in ragged_samples(count)])


def plain(model, batch: Batch, objective: Objective, **options):
    """Total, values and gradients by way of the logits."""
    output = model(**batch.model_inputs())
    found = objective(output.logits, batch, **options)
    extra = auxiliary_loss(model, output, batch, denominator=options.get("denominator"))
    total = found.total if extra is None else found.total + extra
    return total, found.values_n, grads_of(model, total)


def fused(model, batch: Batch, objective: Objective, **options):
    """The same by way of the head."""
    output = model(**batch.model_inputs(), distill=Request(objective, batch, **options))
    return output.loss, output.values_n, grads_of(model, output.loss)


def grads_of(model, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_alike(one, other, *, atol: float = 1e-6) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=atol)
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=atol)
    assert one[2].keys() == other[2].keys()
    for name, grad in one[2].items():
        torch.testing.assert_close(grad, other[2][name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(name, pack):
    """Tied embeddings, a bias, scaled and capped logits, a mixture of experts."""
    model, batch, objective = make_model(name), make_batch(pack=pack), Objective(OBJECTIVE)
    expected = plain(model, batch, objective, denominator=17)
    names = list(model.state_dict())
    head = DistillHead.attach(model, chunk_tokens=5)
    assert head.logit_map == MAPS.get(name, LogitMap())
    assert_alike(fused(model, batch, objective, denominator=17), expected)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
@pytest.mark.parametrize("name", ALL)
def test_every_loss_in_float64(name, chunk_tokens):
    model, batch = make_model("softcap", torch.float64), make_batch()
    objective = Objective({name: ALL[name] or 1.0})
    expected = plain(model, batch, objective)
    DistillHead.attach(model, chunk_tokens=chunk_tokens)
    assert_alike(fused(model, batch, objective), expected, atol=1e-10)


def test_other_calls_give_logits_as_before():
    model, batch = tiny_model(), make_batch()
    before = model(**batch.model_inputs()).logits
    head = DistillHead.attach(model)
    assert torch.equal(model(**batch.model_inputs()).logits, before)
    assert DistillHead.attach(model, chunk_tokens=3) is head
    assert head.chunk_tokens == 3
    assert len(model.generate(batch.input_ids[:1, :3], max_new_tokens=2, do_sample=False)[0]) == 5


def test_a_frozen_head_has_no_gradient(monkeypatch):
    """Neither is one computed: the passes hold no [V, D] buffer."""
    model, batch, objective = make_model("llama"), make_batch(), Objective(OBJECTIVE)
    model.lm_head.weight.requires_grad_(False)
    expected = plain(model, batch, objective)
    DistillHead.attach(model)
    with Largest() as seen:
        found = fused(model, batch, objective)
    assert_alike(found, expected)
    assert "lm_head.weight" not in found[2]
    assert (V, WIDTH) not in seen.products


class Largest(TorchDispatchMode):
    """Remembers the shapes that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.products: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor):
                self.shapes.add(tuple(one.shape))
                if func.overloadpacket.__name__ in ("mm", "addmm_", "zeros_like"):
                    self.products.add(tuple(one.shape))
        return found


def test_logits_are_never_whole():
    """No operation of forward or backward gives more rows of logits than a chunk has."""
    model, batch = make_model("llama"), make_batch(count=12)
    DistillHead.attach(model, chunk_tokens=4)
    with Largest() as seen:
        fused(model, batch, Objective(OBJECTIVE))
    rows = {math.prod(shape[:-1]) for shape in seen.shapes if shape and shape[-1] == V}
    rows -= {WIDTH}  # the weight, transposed
    assert max(rows) == 4
    assert len(batch.signal) > 40


def test_bfloat16_is_summed_in_float32():
    """Against the same model in float64: off by the rounding of bfloat16 matrices only."""
    model, batch, objective = (
        make_model("llama", torch.bfloat16),
        make_batch(),
        Objective(OBJECTIVE),
    )
    exact = plain(make_model("llama").to(torch.bfloat16).double(), batch, objective)
    DistillHead.attach(model, chunk_tokens=4)
    total, _, grads = fused(model, batch, objective)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact[0].item(), rel=0.02)
    wanted = exact[2]["lm_head.weight"]
    error = (grads["lm_head.weight"].double() - wanted).norm() / wanted.norm()
    assert grads["lm_head.weight"].dtype == torch.bfloat16
    assert error < 0.03


def test_autocast_is_that_of_a_linear_layer():
    model, batch, objective = make_model("llama"), make_batch(), Objective(OBJECTIVE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch.model_inputs())
        expected = objective(output.logits, batch)
    reference = grads_of(model, expected.total)
    DistillHead.attach(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**batch.model_inputs(), distill=Request(objective, batch))
    grads = grads_of(model, found.loss)
    torch.testing.assert_close(found.loss, expected.total, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - reference[name]).norm() <= 0.02 * reference[name].norm() + 1e-6, name


def test_float16_sums_of_a_chunk_do_not_overflow():
    """512 positions with one label: 512 x 256 x 10 / 11 is more than float16 has, the mean is not.

    No loss scale would help: the chunk's sum is taken before it.
    """
    signal = SparseSignal.from_arrays("topk:k=1", range(513), np.full(512, 5), np.zeros(512))
    head = DistillHead(4, V, bias=False).half()
    head.chunk_tokens, head.logit_map = None, LogitMap()
    torch.nn.init.zeros_(head.weight)
    hidden = torch.full((513, 4), 256.0, dtype=torch.float16)
    batch = one_sample_batch(signal, np.full(512, 5))
    head(hidden, Request(Objective({"ce": 1.0}), batch))[0].backward()
    expected = torch.full((V, 4), 256 / V)
    expected[5] -= 256
    torch.testing.assert_close(head.weight.grad.float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, batch, objective = make_model("llama").train(), make_batch(), Objective(OBJECTIVE)
    expected = plain(model, batch, objective)
    DistillHead.attach(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_alike(fused(model, batch, objective), expected)


def test_vocabulary_padding_counts_as_nothing():
    """Columns from num_ids on are as if the student did not have them."""
    model, batch, objective = make_model("softcap"), make_batch(), Objective(OBJECTIVE)
    expected = plain(model, batch, objective)
    model = make_model("softcap")
    model.resize_token_embeddings(V + 5, mean_resizing=False)
    DistillHead.attach(model, num_ids=V)
    found = fused(model, batch, objective)
    torch.testing.assert_close(found[0], expected[0])
    weight_grad = found[2]["model.embed_tokens.weight"]
    assert not weight_grad[V:].any()
    torch.testing.assert_close(weight_grad[:V], expected[2]["model.embed_tokens.weight"])
    DistillHead.attach(model, num_ids=V - 3)
    with pytest.raises(SignalError, match=f"ids from 0 to {V - 4}"):
        fused(model, batch, objective)


def test_a_batch_without_positions_still_reaches_all_parameters():
    model, objective = make_model("llama"), Objective(OBJECTIVE)
    DistillHead.attach(model)
    samples = [s for s in ragged_samples(8) if not s.num_scored]
    total, values_n, grads = fused(model, Collator()([topk_sample(s) for s in samples]), objective)
    assert total.item() == 0
    assert values_n.tolist() == [0, 0, 0]
    assert {name for name, _ in model.named_parameters()} == grads.keys()
    assert not any(grad.any() for grad in grads.values())


def test_without_gradients_it_only_evaluates():
    model, batch, objective = make_model("llama"), make_batch(), Objective(OBJECTIVE)
    expected = plain(model, batch, objective)
    DistillHead.attach(model)
    with torch.no_grad(), Largest() as seen:
        output = model(**batch.model_inputs(), distill=Request(objective, batch))
    torch.testing.assert_close(output.loss, expected[0])
    assert (V, WIDTH) not in seen.products


def test_two_teachers_and_schedules():
    from kdstore.readers.collate import Answers

    batch, other = make_batch(), make_batch()
    answers = Answers(other.labels, other.signal, other.logit_rows_S, 2 * other.weights_S)
    batch = replace(batch, teachers={"second": answers})
    objective = Objective(
        {
            "forward_kl": {"weight": {"start": 1.0, "end": 0.0}},
            "ce": 0.1,
            "mine": {"loss": "tvd", "teacher": "second"},
        }
    )
    model = make_model("llama")
    expected = plain(model, batch, objective, progress=0.25)
    DistillHead.attach(model, chunk_tokens=4)
    assert_alike(fused(model, batch, objective, progress=0.25), expected)
