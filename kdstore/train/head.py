"""DistillHead: a causal LM's output layer that gives losses instead of logits when asked to.

Logits [T, V] are what fills memory: 8,192 positions of 152k are 5 GB in float32, several times over
with their gradient. Here hidden states become logits a chunk of scored positions at a time, each
chunk's losses and gradients are taken at once, by hand, and the logits are dropped. What is kept
for the backward pass is the gradient of the hidden states and, unless it is frozen, of the weight.

The head is a module of the model and is called inside the model's forward, so the hooks of DDP,
FSDP2, ZeRO-3 and PEFT fire as ever: outside of it, a sharded weight is not whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from kdstore.errors import UsageError
from kdstore.train.fused import FusedPart, fused_sums
from kdstore.train.logit_map import LogitMap, measure_logit_map, unfit
from kdstore.train.losses.student import wide
from kdstore.train.objective import Objective, check_rows, divisor

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch


class HeadRequest(Protocol):
    """Something that a model is asked for instead of logits."""

    def answer(self, head: DistillHead, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        """Made of the hidden states of all the batch's tokens, while the head's weight is whole."""
        ...

    def output(self, model: Any, answer: tuple[Tensor, ...], output: Any) -> ModelOutput:
        """What the model's forward returns, given what it would have returned, without logits."""
        ...


@dataclass
class DistillOutput(ModelOutput):  # type: ignore[misc]
    """``loss`` to call backward on, auxiliary losses in it; ``values_n``: each loss, unweighted."""

    loss: Tensor | None = None
    values_n: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """What the head is asked for: an objective's losses of a batch, over ``denominator``.

    ``denominator`` defaults to the batch's scored positions, ``progress`` is the share of training
    that is done.
    """

    objective: Objective
    batch: Batch
    progress: float = 0.0
    denominator: Tensor | float | None = None

    def answer(self, head: DistillHead, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Σ weight · loss, and each loss [n], unweighted."""
        check_rows(hidden_TD, self.batch)
        totals, values = [], []
        for part in self.objective.parts(self.batch, progress=self.progress):
            fused = FusedPart(part, head.logit_map, head.chunk_tokens)
            hidden_SD = hidden_TD.index_select(0, part.batch.logit_rows_S)
            total, sums_n = fused_sums(hidden_SD, head.weight, head.bias, fused)
            totals.append(total)
            values.append(sums_n)
        by = divisor(self.batch, self.denominator)
        return torch.stack(totals).sum() / by, torch.cat(values) / by

    def of_logits(self, model: Any, output: Any) -> DistillOutput:
        """The same from logits that a model without the head gave."""
        found = self.objective(
            output.logits, self.batch, progress=self.progress, denominator=self.denominator
        )
        return self.output(model, (found.total, found.values_n), output)

    def output(self, model: Any, answer: tuple[Tensor, ...], output: Any) -> DistillOutput:
        """The losses, with the auxiliary one of a mixture of experts."""
        loss, values_n = answer
        extra = auxiliary_loss(model, output, self.batch, denominator=self.denominator)
        return DistillOutput(loss=loss if extra is None else loss + extra, values_n=values_n)


class DistillHead(nn.Linear):
    """The output layer of a model, with its very parameters; without a request it gives logits.

    ``DistillHead.attach(model)`` puts it in place. Then ``model(**inputs, distill=request)`` gives
    a ``DistillOutput``, and ``model(**inputs)`` what it always gave.

    * ``chunk_tokens``: positions whose logits exist at once; default: 64 MiB of logits, on CUDA 256
    * ``num_ids``: logits from there on are vocabulary padding and count as -inf; default: none are
    """

    logit_map: LogitMap
    chunk_tokens: int | None
    _captured: list[Tensor] | None = None

    @classmethod
    def attach(
        cls, model: Any, *, chunk_tokens: int | None = None, num_ids: int | None = None
    ) -> DistillHead:
        """Put the head in the place of a causal LM's output layer, once; before it is wrapped.

        Raises UsageError for an output layer that is no plain nn.Linear, such as one with an
        adapter, and for a model that does more to its logits than a scale and a soft cap.
        """
        if chunk_tokens is not None and chunk_tokens < 1:
            raise UsageError(
                "a chunk has tokens",
                where="DistillHead.attach",
                expected="chunk_tokens >= 1",
                got=chunk_tokens,
                todo="leave it out for as many as fit in 64 MiB, on CUDA 256",
            )
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        layer = model.get_output_embeddings()
        if isinstance(layer, DistillHead):
            head = layer
        elif type(layer) is not nn.Linear:
            raise unfit(model, f"its output layer is a {type(layer).__name__}")
        else:
            head = cls._taking_over(layer)
            head.logit_map = measure_logit_map(model, layer)
            model.set_output_embeddings(head)
        _learn_requests(model)
        head.chunk_tokens, head.logit_map = chunk_tokens, replace(head.logit_map, num_ids=num_ids)
        return head

    @classmethod
    def _taking_over(cls, layer: nn.Linear) -> DistillHead:
        bias = layer.bias is not None
        head = cls(layer.in_features, layer.out_features, bias=bias, device="meta")
        head.weight = layer.weight
        if bias:
            head.bias = layer.bias
        return head.train(layer.training)

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Within it, calls give no logits: what they were given is put in the list."""
        self._captured = []
        try:
            yield self._captured
        finally:
            self._captured = None

    def forward(self, hidden: Tensor, request: HeadRequest | None = None) -> Any:
        """Logits [..., V]; with a request, its answer, for which ``hidden`` is of a whole batch."""
        if self._captured is not None:
            self._captured.append(hidden)
            return hidden.new_zeros((*hidden.shape[:-1], 1))
        if request is None:
            return super().forward(hidden)
        self._check_whole()
        return request.answer(self, hidden.reshape(-1, hidden.shape[-1]))

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """The model's logits [C, V] of a few hidden states, in float32 at least."""
        answers = super().forward(hidden_CD)
        return self.logit_map.apply_(answers.to(wide(answers.dtype)))

    def _check_whole(self) -> None:
        if isinstance(self.weight, DTensor) or not self.weight.numel():
            raise UsageError(
                "the head's weight is sharded: the head was called outside the model's forward",
                where="DistillHead",
                expected="a whole weight, as it is inside the forward of a sharded model",
                got=f"{type(self.weight).__name__} of {tuple(self.weight.shape)}",
                todo="call model(**inputs, distill=request) on the wrapped model; tensor "
                "parallelism of the output layer is not supported",
            )


def _learn_requests(model: Any) -> None:
    """Let a model's forward know the keyword ``distill``; one that knows it stays as it is."""
    if "distill" in inspect.signature(model.forward).parameters:
        return
    # Not bound to the model: a copy of it would go on calling the one it was copied from.
    plain = getattr(model.forward, "__func__", None) or partial(_without_model, model.forward)

    # Named so because pickle asks the class for a method by its name; what it loads has the forward
    # of its class, and learns anew when a head is attached.
    def forward(self: Any, *args: Any, distill: HeadRequest | None = None, **kwargs: Any) -> Any:
        if distill is None:
            return plain(self, *args, **kwargs)
        head = self.get_output_embeddings()
        if not isinstance(head, DistillHead):
            raise unfit(self, f"its output layer has become a {type(head).__name__}")
        with head.capture() as captured:
            output = plain(self, *args, **kwargs)
        return distill.output(self, head(captured[0], distill), output)

    model.forward = MethodType(forward, model)


def _without_model(forward: Any, _model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a forward that is no method."""
    return forward(*args, **kwargs)


def auxiliary_loss(
    model: Any, output: Any, batch: Batch, *, denominator: Tensor | float | None
) -> Tensor | None:
    """A batch's share of the step's load-balancing loss of a mixture of experts; None without one.

    transformers computes it where ``output_router_logits`` is set. Micro-batches count by their
    scored positions.
    """
    found = getattr(output, "aux_loss", None)
    if not isinstance(found, Tensor):
        return None
    share = max(len(batch.signal), 1) / divisor(batch, denominator)
    return model.config.get_text_config().router_aux_loss_coef * share * found  # type: ignore[no-any-return]
