"""DistillTrainer: `transformers.Trainer` on batches that carry a teacher's signal.

Accelerate, FSDP2, DeepSpeed, checkpoints and logging integrations are the parent's. Ours are the
losses, their one denominator, and an evaluation that divides once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from kdstore.errors import UsageError
from kdstore.sample import Sample
from kdstore.train.evaluate import metrics_of_sums, nll_sums
from kdstore.train.fields import refuse_unknown
from kdstore.train.losses import LOSSES

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch

# What would be ignored in silence, or change what a loss means.
_REFUSED = {
    "label_smoothing_factor": "the teacher's distribution is the smooth target",
    "bf16_full_eval": "use bf16, or load the student in bfloat16",
    "fp16_full_eval": "use fp16, or load the student in float16",
}


class DistillTrainer(Trainer):  # type: ignore[misc]
    """Trains ``model`` on Σ weight · loss over the samples of a store.

    * ``train_dataset``: a Store, or anything map-style whose items are Samples with a signal
    * ``losses``: name in `kdstore.losses.LOSSES` -> weight
    * ``data_collator``: a `kdstore.Collator`: list of Samples -> Batch
    * ``eval_dataset``: held-out Samples; scored are their runs, no signal is needed

    **One denominator.** Each step divides by the scored positions of all its micro-batches on
    all ranks, so neither gradient accumulation nor the number of ranks changes the step. Ragged
    last batches are evened out as accelerate does, by repeating samples.

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
        losses: Mapping[str, float],
        data_collator: Any,
        eval_dataset: Sequence[Sample] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown(losses, LOSSES, where="losses")
        _check_arguments(args)
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            **kwargs,
        )
        self.loss_weights = {name: weight for name, weight in losses.items() if weight}
        self._loss_sums = torch.zeros(len(self.loss_weights), device=args.device)
        self._steps_summed = 0
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise UsageError(
                "context and sequence parallelism would cut a batch off its signal",
                expected="cp_size = sp_size = 1",
                got=(self.get_cp_size(), self.get_sp_size()),
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
        outputs = model(**inputs.model_inputs())
        values = {
            name: LOSSES[name](outputs.logits, inputs, denominator=num_items_in_batch)
            for name in self.loss_weights
        }
        self._loss_sums += torch.stack([value.detach().float() for value in values.values()])
        weighted = [self.loss_weights[name] * value for name, value in values.items()]
        total = torch.stack(weighted).sum()
        if num_items_in_batch is not None:
            total = total * self._data_ranks()
        return (total, outputs) if return_outputs else total

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next step and their number of scored positions."""
        self._steps_summed += 1
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """int64: scored positions of the step, over micro-batches and ranks; at least 1."""
        count = torch.tensor(sum(len(batch.signal) for batch in batch_samples), device=device)
        # Ranks of one tensor-parallel group see the same batches.
        total = self.accelerator.gather(count).sum() // self.get_tp_size()
        return total.clamp(min=1)  # type: ignore[no-any-return]

    def _data_ranks(self) -> int:
        return int(self.accelerator.num_processes // self.get_tp_size())

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Estimated operations of a forward and backward pass of one batch."""
        return int(super().floating_point_ops({"input_ids": inputs.input_ids}))

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        super()._track_num_input_tokens(inputs.model_inputs())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss's mean since the last log to what Trainer logs of training."""
        if "loss" in logs and self._steps_summed:
            logs = {**logs, **self._drain_loss_means()}
        super().log(logs, start_time)

    def _drain_loss_means(self) -> dict[str, float]:
        sums = self.accelerator.reduce(self._loss_sums, reduction="sum") / self.get_tp_size()
        means = (sums / self._steps_summed).tolist()
        self._loss_sums, self._steps_summed = torch.zeros_like(self._loss_sums), 0
        return dict(zip(self.loss_weights, means, strict=True))

    def evaluate(
        self,
        eval_dataset: Sequence[Sample] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """``eval_loss`` (nats per token), ``eval_perplexity`` and ``eval_num_tokens``.

        Summed over all batches and ranks, then divided once. ``ignore_keys`` is the parent's and
        has nothing to ignore here.
        """
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        if samples is None:
            raise UsageError("nothing to evaluate", todo="pass eval_dataset")
        sums = nll_sums(
            self.model_wrapped,
            samples,
            batch_size=self.args.per_device_eval_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        found = metrics_of_sums(self.accelerator.reduce(sums, reduction="sum"))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _check_arguments(args: TrainingArguments) -> None:
    for name, todo in _REFUSED.items():
        if getattr(args, name):
            raise UsageError(f"{name} does not work here", got=getattr(args, name), todo=todo)
    if args.n_gpu > 1:
        raise UsageError(
            "one process with several GPUs would cut a batch off its signal",
            expected="one process per GPU",
            got=f"{args.n_gpu} GPUs",
            todo="start with `accelerate launch` or torchrun, or set CUDA_VISIBLE_DEVICES",
        )
