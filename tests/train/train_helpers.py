"""Small signals, batches and models with dense float64 references to hold them against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from kdstore.readers.collate import Batch, Collator
from kdstore.sample import Sample
from kdstore.signal import SparseSignal
from kdstore.train.trainer import DistillTrainer

V = 11


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Dense float64 log-probabilities of rows of logits."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def entropy_S(logp: NDArray[np.float64]) -> NDArray[np.float64]:
    """[S]: -Σ p log p of dense rows."""
    return -(np.exp(logp) * logp).sum(-1)


def signal_of_mask(
    selection: str, logp: NDArray[np.float64], keep: NDArray[np.bool_], **extra: Any
) -> SparseSignal:
    """The kept cells of dense [S, V] log-probabilities as entries."""
    indptr = np.concatenate([[0], np.cumsum(keep.sum(1))])
    return SparseSignal.from_arrays(selection, indptr, np.nonzero(keep)[1], logp[keep], **extra)


def full_signal(logits: NDArray[Any]) -> SparseSignal:
    """Every token an entry, with a deliberately coarse entropy, as a store keeps it."""
    logp = log_softmax(logits)
    scalars = {"entropy": np.round(entropy_S(logp) * 50) / 50}
    return signal_of_mask("full", logp, np.ones_like(logp, dtype=bool), scalars=scalars)


def topk_signal(logits: NDArray[Any], k: int) -> SparseSignal:
    """The k largest, and what is left as rest."""
    logp = log_softmax(logits)
    keep = np.zeros_like(logp, dtype=bool)
    np.put_along_axis(keep, np.argsort(-logp, 1)[:, :k], True, 1)
    outside = np.where(keep, 0.0, np.exp(logp)).sum(1)
    with np.errstate(divide="ignore"):
        rest = np.log(outside)
    return signal_of_mask(f"topk:k={k}", logp, keep, rest_S=rest)


def pps_signal(logits: NDArray[Any], rng: np.random.Generator) -> SparseSignal:
    """Sparse distributions that sum to one: some entries kept, the last one takes the rest."""
    logp = log_softmax(logits)
    keep = rng.random(logp.shape) < 0.4
    keep[:, 0] = True
    sparse = np.where(keep, np.exp(logp), 0.0)
    sparse[:, 0] += 1 - sparse.sum(1)
    with np.errstate(divide="ignore"):
        sparse_logp = np.log(sparse)
    scalars = {"entropy": entropy_S(logp)}
    return signal_of_mask("pps:tau=0.1", sparse_logp, keep, scalars=scalars)


def sample_of(length: int, runs: tuple[tuple[int, int], ...], *, seed: int, name: str) -> Sample:
    """A sample of random tokens, scored in ``runs`` by a random teacher of ``V`` tokens."""
    rng = np.random.default_rng(seed)
    sample = Sample(name, rng.integers(0, V, length).astype(np.int32), runs=runs)
    logits = 2 * rng.normal(size=(sample.num_scored, V))
    return replace(sample, signal=pps_signal(logits, rng))


def ragged_samples(count: int, *, seed: int = 0) -> list[Sample]:
    """Samples of 3 to 14 tokens; some have a masked prompt, some two runs, one in eight none."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        length = int(rng.integers(3, 15))
        choices = [((1, length),), ((2, length),), ((1, 2), (3, length))]
        runs = () if index % 8 == 7 else choices[index % 3]
        runs = tuple((a, b) for a, b in runs if a < b)
        samples.append(sample_of(length, runs, seed=seed * 1000 + index, name=f"s{index}"))
    return samples


def one_sample_batch(signal: SparseSignal, labels: NDArray[Any] | None = None) -> Batch:
    """A batch whose logit row s answers position s of ``signal``: one sample of S + 1 tokens."""
    tokens = np.zeros(len(signal) + 1, dtype=np.int32)
    if labels is not None:
        tokens[1:] = labels
    runs = ((1, len(signal) + 1),) if len(signal) else ()
    return Collator()([Sample("one", tokens, runs=runs, signal=signal)])


def tiny_model(seed: int = 0, config: LlamaConfig | None = None) -> LlamaForCausalLM:
    """A Llama of one layer, 16 wide, on ``V`` tokens, with weights of a visible size."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config or tiny_config())


def tiny_config(**changes: Any) -> LlamaConfig:
    """Its configuration, with some values changed."""
    return LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        **changes,
    )


def make_trainer(
    model: LlamaForCausalLM,
    samples: list[Sample],
    folder: Path,
    *,
    losses: dict[str, float] | None = None,
    pack: bool = False,
    eval_dataset: list[Sample] | None = None,
    callbacks: list[Any] | None = None,
    **arguments: Any,
) -> DistillTrainer:
    """A trainer on the CPU that prints nothing; ``arguments`` are TrainingArguments."""
    return DistillTrainer(
        model,
        training_arguments(folder, **arguments),
        train_dataset=samples,
        losses=losses or {"forward_kl": 1.0},
        data_collator=Collator(pack=pack),
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


def training_arguments(folder: Path, **arguments: Any) -> TrainingArguments:
    """Of plain SGD on the CPU, that prints nothing and logs each step."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    }
    return TrainingArguments(**(defaults | arguments))


def parameters_of(model: torch.nn.Module) -> torch.Tensor:
    """All parameters in one flat tensor."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def assert_same_signal(found: SparseSignal, wanted: SparseSignal) -> None:
    """Equal in every bit."""
    for name in ("indptr", "ids_N", "logprobs_N", "rest_S"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert found.scalars.keys() == wanted.scalars.keys()
    for name, values in wanted.scalars.items():
        np.testing.assert_array_equal(found.scalars[name], values)


def trained(folder: Path) -> torch.Tensor:
    """All parameters of the student that a run has left."""
    return parameters_of(AutoModelForCausalLM.from_pretrained(folder))
