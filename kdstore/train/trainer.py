"""DistillTrainer: `transformers.Trainer` on batches that carry a teacher's signal.

Accelerate, FSDP2, DeepSpeed, checkpoints and logging integrations are the parent's. Ours are the
losses, their one denominator, and an evaluation that divides once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from kdstore.errors import StoreMismatchError, UsageError
from kdstore.sample import Sample
from kdstore.train.attention import takes_lengths
from kdstore.train.evaluate import evaluation_sums, metrics_of_sums
from kdstore.train.finite import (
    STEPS_UNCHECKED,
    LossWatch,
    check_gradient,
    refuse_losses,
    refuse_weights,
    weights_not_finite,
)
from kdstore.train.head import DistillHead, Request
from kdstore.train.objective import Objective
from kdstore.train.store_trainer import StoreTrainer
from kdstore.train.student import longest_sequence

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch

# What would be ignored in silence, or change what a loss means.
_REFUSED = {
    "label_smoothing_factor": "the teacher's distribution is the smooth target",
    "bf16_full_eval": "use bf16, or load the student in bfloat16",
    "fp16_full_eval": "use fp16, or load the student in float16",
}


class DistillTrainer(StoreTrainer):
    """Trains ``model`` on Σ weight · loss over the samples of a store.

    * ``train_dataset``: Store, Concatenation, Join, Mixture, OnlineSamples, or a list of Samples
    * ``losses``: what `kdstore.train.objective.Objective` takes: name -> weight or options
    * ``loader``: for a store, options of `kdstore.readers.loader.Loader`. By default ``batch_size``
      is per_device_train_batch_size, unless ``batch_tokens`` is set, ``seed`` is data_seed or
      seed, and ``shuffle`` is what train_sampling_strategy says
    * ``data_collator``: for a list: samples -> Batch; by default a `kdstore.Collator`
    * ``fused``: take losses from hidden states by a `DistillHead`; False makes whole logits first
    * ``eval_dataset``: held-out Samples; scored are their runs, no signal is needed

    **One denominator.** Each step divides by the scored positions of all its micro-batches on
    all ranks, so neither gradient accumulation nor the number of ranks changes the step. Where an
    epoch of a store ends, fillers that score nothing complete its last step. Ragged last batches of
    a list are evened out as accelerate does, by repeating samples.

    A loss, gradient or weight that is not finite is a TrainingError, at the next log or checkpoint.

    Logs each loss under its name, unweighted, beside their weighted sum ``loss``.
    """

    # compute_loss divides by the count of the whole step, so Trainer must not divide again.
    loss_is_scaled_for_ga = True
    control: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        losses: Mapping[str, Any],
        fused: bool = True,
        eval_dataset: Sequence[Sample] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_arguments(args)
        _check_extras(kwargs)
        self.objective = Objective(losses)
        self._fused = fused
        if fused:
            DistillHead.attach(model)
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False  # it hides a NaN, and waits for each micro-batch
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self._longest = longest_sequence(model)
        self._loss_sums = torch.zeros(len(self.objective.names), device=args.device)
        self._steps_summed = 0
        self._watch = LossWatch(args.device)
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise UsageError(
                "context and sequence parallelism would cut a batch off its signal",
                where="parallelism_config",
                expected="cp_size = sp_size = 1",
                got=(self.get_cp_size(), self.get_sp_size()),
                todo="leave both out; FSDP2 and ZeRO-3 shard what does not fit",
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Σ weight · loss of one micro-batch, as its share of the step's mean.

        ``model`` is the wrapped module: calling what it wraps would skip the synchronisation of
        gradients. The ranks' gradients are averaged afterwards, hence the factor.
        """
        request = Request(self.objective, inputs, self._progress(), num_items_in_batch)
        model_inputs = inputs.model_inputs(varlen=takes_lengths(self.model))
        if self._fused:
            outputs = model(**model_inputs, distill=request)
        else:
            outputs = request.of_logits(self.model, model(**model_inputs))
        self._loss_sums += outputs.values_n.float()
        total = outputs.loss
        if num_items_in_batch is not None:
            total = total * self._data_ranks()
        return (total, outputs) if return_outputs else total

    def _progress(self) -> float:
        return float(self.state.global_step / max(self.state.max_steps, 1))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next step and their number of scored positions."""
        if self._steps_summed and self._steps_summed % STEPS_UNCHECKED == 0:
            self._check_losses()
        self._steps_summed += 1
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a micro-batch, after its backward pass."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._watch.see(inputs, loss, step=self.state.global_step + 1)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """int64: scored positions of the step, over micro-batches and ranks; at least 1."""
        count = torch.tensor(sum(len(batch.signal) for batch in batch_samples), device=device)
        # Ranks of one tensor-parallel group see the same batches.
        total = self.accelerator.gather(count).sum() // self.get_tp_size()
        return total.clamp(min=1)  # type: ignore[no-any-return]

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        if self._longest is not None and inputs.longest > self._longest:
            raise StoreMismatchError(
                "a sample is longer than the student takes",
                where=f"a batch of {', '.join(inputs.sample_ids[:3])}, …",
                expected=f"at most {self._longest} tokens (max_position_embeddings)",
                got=inputs.longest,
                todo="dump with a smaller --max-length, or take a student with a longer context",
            )
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Estimated operations of a forward and backward pass of one batch."""
        return int(super().floating_point_ops({"input_ids": inputs.input_ids}))

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        super()._track_num_input_tokens(inputs.model_inputs())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss's mean since the last log to what Trainer logs of training.

        Raises TrainingError if one of them, or the gradient, is not finite.
        """
        if "train_loss" in logs:  # the end of training
            self._check_losses()
        if "loss" in logs and self._steps_summed:
            logs = {**logs, **self._drain_loss_means()}
            if self.accelerator.scaler is None:  # it skips the steps of such gradients
                check_gradient(logs, step=self.state.global_step, run=self.args.output_dir)
        super().log(logs, start_time)

    def _drain_loss_means(self) -> dict[str, float]:
        sums = self._check_losses() / self.get_tp_size()
        means = (sums / self._steps_summed).tolist()
        self._loss_sums, self._steps_summed = torch.zeros_like(self._loss_sums), 0
        return dict(zip(self.objective.names, means, strict=True))

    def _check_losses(self) -> Tensor:
        """Sums of the losses since the last log over all ranks; TrainingError if not finite."""
        sums: Tensor = self.accelerator.reduce(self._loss_sums, reduction="sum")
        bad = [
            name
            for name, sum_ in zip(self.objective.names, sums.tolist(), strict=True)
            if not math.isfinite(sum_)
        ]
        if bad:
            refuse_losses(bad, self._watch, step=self.state.global_step, run=self.args.output_dir)
        self._watch.clear()
        return sums

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint; TrainingError instead if losses or weights are not finite."""
        self._check_losses()
        self.check_weights()
        super()._save_checkpoint(model, trial)

    def check_weights(self) -> None:
        """TrainingError on every rank if one has weights that are not finite."""
        name = weights_not_finite(self.model)
        flag = torch.tensor(float(name is not None), device=self.args.device)
        if self.accelerator.reduce(flag, reduction="sum"):
            refuse_weights(name, step=self.state.global_step, run=self.args.output_dir)

    def evaluate(
        self,
        eval_dataset: Sequence[Sample] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The metrics of `kdstore.train.evaluate.metrics_of_sums`, as ``eval_loss`` and so on.

        Summed over all batches and ranks, then divided once. ``ignore_keys`` is the parent's and
        has nothing to ignore here.
        """
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        if samples is None:
            raise UsageError(
                "nothing to evaluate",
                where="DistillTrainer.evaluate",
                expected="held-out samples",
                got="none",
                todo="pass eval_dataset",
            )
        sums = evaluation_sums(
            self.model_wrapped,
            samples,
            batch_size=self.args.per_device_eval_batch_size,
            # Ranks of one tensor-parallel group run the same batches.
            rank=self.accelerator.process_index // self.get_tp_size(),
            world_size=self._data_ranks(),
        )
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
            sums = sums / self.get_tp_size()
        found = metrics_of_sums(sums)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _check_extras(extras: Mapping[str, Any]) -> None:
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if extras.get(name) is not None:
            raise UsageError(
                f"{name} would never be called",
                where="DistillTrainer",
                expected=f"no {name}",
                got=extras[name],
                todo="override compute_loss or evaluate in a subclass",
            )


def _check_arguments(args: TrainingArguments) -> None:
    for name, todo in _REFUSED.items():
        if getattr(args, name):
            raise UsageError(
                f"{name} does not work here",
                where="TrainingArguments",
                expected=f"no {name}",
                got=getattr(args, name),
                todo=todo,
            )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise UsageError(
            "this order of samples does not work here",
            where="train_sampling_strategy",
            expected="random or sequential",
            got=args.train_sampling_strategy,
            todo="leave it out for random",
        )
    if args.n_gpu > 1:
        raise UsageError(
            "one process with several GPUs would cut a batch off its signal",
            where="TrainingArguments",
            expected="one process per GPU",
            got=f"{args.n_gpu} GPUs",
            todo="start with `accelerate launch` or torchrun, or set CUDA_VISIBLE_DEVICES",
        )
