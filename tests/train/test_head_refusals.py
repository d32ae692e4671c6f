"""DistillHead in models that are copied, changed, or not what it fits; and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from kdstore.errors import UsageError
from kdstore.train.head import DistillHead, Request
from kdstore.train.objective import Objective
from tests.train.test_distill_head import (
    OBJECTIVE,
    WIDTH,
    assert_alike,
    fused,
    make_batch,
    make_model,
    plain,
)
from tests.train.train_helpers import V


def test_gradients_are_given_out_once():
    model, batch = make_model("llama"), make_batch()
    DistillHead.attach(model)
    output = model(**batch.model_inputs(), distill=Request(Objective({"ce": 1.0}), batch))
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given out once"):
        output.loss.backward()


def test_misplaced_heads_are_refused():
    """An adapter on the output layer, one put there later, and logits that are more than capped."""
    model, batch = make_model("llama"), make_batch()
    request = Request(Objective({"ce": 1.0}), batch)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UsageError, match="its output layer is a Sequential"):
        DistillHead.attach(model)
    model.lm_head = model.lm_head[0]
    DistillHead.attach(model)
    model.lm_head = torch.nn.Linear(WIDTH, V)
    with pytest.raises(UsageError, match="its output layer has become a Linear"):
        model(**batch.model_inputs(), distill=request)


def test_models_that_do_more_to_their_logits_are_refused():
    model = make_model("llama")
    plain_forward = model.forward

    def shifted(*args, **kwargs):
        output = plain_forward(*args, **kwargs)
        output.logits = output.logits + 0.1
        return output

    model.forward = shifted
    with pytest.raises(UsageError, match="no scaled and capped answers"):
        DistillHead.attach(model)
    assert type(model.lm_head) is torch.nn.Linear


def test_other_architectures_fit_or_are_refused():
    """Bloom ties its embeddings by another name; its head is plain all the same."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=V, hidden_size=WIDTH, n_layer=1, n_head=2, use_cache=False)
    model, batch, objective = (
        AutoModelForCausalLM.from_config(config),
        make_batch(),
        Objective({"forward_kl": 1.0}),
    )
    expected = plain(model, batch, objective)
    DistillHead.attach(model)
    assert_alike(fused(model, batch, objective), expected)


def test_copies_have_their_own_weights():
    """A deep copy answers with its weights; so does what was pickled, once it has its head."""
    model, batch, objective = make_model("llama"), make_batch(), Objective(OBJECTIVE)
    DistillHead.attach(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = fused(model, batch, objective)[0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
    DistillHead.attach(copies[1])
    for one in copies:
        torch.testing.assert_close(fused(one, batch, objective)[0], before)
        expected = objective(one(**batch.model_inputs()).logits, batch).total
        torch.testing.assert_close(expected, before)


def test_a_new_vocabulary_needs_a_new_head():
    model, batch, objective = make_model("llama"), make_batch(), Objective(OBJECTIVE)
    DistillHead.attach(model)
    forward = model.forward
    model.resize_token_embeddings(V + 5, mean_resizing=False)
    with pytest.raises(UsageError, match="its output layer has become a Linear"):
        fused(model, batch, objective)
    DistillHead.attach(model)
    assert model.forward == forward
    assert_alike(fused(model, batch, objective), plain(model, batch, objective))


def test_rows_that_are_not_the_batch_are_refused():
    """Prompt tuning puts tokens before each row, so no position would be where it was."""
    model, batch, objective = make_model("llama"), make_batch(), Objective(OBJECTIVE)
    DistillHead.attach(model)
    longer = {**batch.model_inputs(), "input_ids": torch.cat([batch.input_ids] * 2, 1)}
    del longer["attention_mask"]
    with pytest.raises(UsageError, match=f"(.|\n)*got: {2 * batch.input_ids.numel()}"):
        model(**longer, distill=Request(objective, batch))
    with pytest.raises(UsageError, match="one answer to each token"):
        objective(model(**longer).logits, batch)


def test_a_chunk_of_no_tokens_is_refused():
    with pytest.raises(UsageError, match="chunk_tokens >= 1"):
        DistillHead.attach(make_model("llama"), chunk_tokens=-1)


def test_a_hook_that_changes_logits_is_refused():
    """The head would not have it."""
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda _module, _args, logits: 2 * logits)
    with pytest.raises(UsageError, match="no scaled and capped answers"):
        DistillHead.attach(model)
