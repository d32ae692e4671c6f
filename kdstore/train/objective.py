"""What a run minimises: a weighted sum of losses, whose weights and temperatures may change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdstore.errors import UsageError
from kdstore.train.fields import build, refuse_unknown
from kdstore.train.losses import LOSSES, Loss
from kdstore.train.losses.base import places_of
from kdstore.train.losses.student import Places, Reading, Student, read_student
from kdstore.train.schedule import Schedule, make_schedule

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch
    from kdstore.signal import TorchSignal


@dataclass(frozen=True)
class Term:
    """A loss, its weight, and the teacher of joined stores that it listens to; None is the main."""

    loss: Loss
    weight: Schedule
    temperature: Schedule | None = None
    teacher: str | None = None

    def loss_at(self, progress: float) -> Loss:
        """The loss at the temperature of the moment."""
        if self.temperature is None:
            return self.loss
        return replace(self.loss, temperature=self.temperature.at(progress))  # type: ignore[call-arg]

    def losses(self) -> list[Loss]:
        """The loss as training begins, half-way through a change of its temperature, and ends."""
        changing = self.temperature
        halfway = 0.5 if changing is None else (changing.since + changing.until) / 2
        return [self.loss_at(progress) for progress in (0.0, halfway, 1.0)]


@dataclass(frozen=True)
class LossValues:
    """``total`` = Σ weight · loss, a scalar with a graph; each loss [n], unweighted, without."""

    total: Tensor
    values_n: Tensor


class Objective:
    """Σ weight · loss, by name; terms whose weight is zero throughout are left out.

    >>> objective = Objective({"forward_kl": 1.0, "jsd": {"weight": 0.5, "beta": 0.1}})
    >>> objective.names
    ['forward_kl', 'jsd']
    """

    def __init__(self, losses: Mapping[str, Any]) -> None:
        terms = [(name, _term(name, spec)) for name, spec in losses.items()]
        terms = [(name, term) for name, term in terms if not term.weight.is_zero]
        self.teachers = list(dict.fromkeys(term.teacher for _, term in terms))
        self.terms = dict(sorted(terms, key=lambda one: self.teachers.index(one[1].teacher)))
        if not self.terms:
            raise UsageError(
                "no loss to train on",
                where="losses",
                expected="a weight other than 0",
                got=dict(losses),
            )

    @property
    def names(self) -> list[str]:
        """The names of the losses, in the order of ``LossValues.values_n``."""
        return list(self.terms)

    def __call__(
        self,
        logits: Tensor,
        batch: Batch,
        *,
        progress: float = 0.0,
        denominator: Tensor | float | None = None,
    ) -> LossValues:
        """The losses of logits [..., V], over ``denominator`` (default: the batch's positions).

        ``progress`` from 0 to 1 is the share of training that is done.
        """
        check_rows(logits, batch)
        parts = list(self.parts(batch, progress=progress))
        sums = [
            part.sums(
                read_student(logits, part.batch.logit_rows_S, part.places, part.readings),
                part.batch.signal,
                part.batch.weights_S,
            )
            for part in parts
        ]
        values_n = torch.cat(sums) / divisor(batch, denominator)
        weights = [weight for part in parts for weight in part.weights]
        return LossValues(weighted(values_n, weights), values_n.detach())

    def check(self, signal: TorchSignal, *, teacher: str | None = None) -> None:
        """UsageError or SignalError if signals like a teacher's will not do for its losses."""
        for term in self.terms.values():
            if term.teacher == teacher:
                for loss in term.losses():
                    loss.reading(signal)

    def parts(self, batch: Batch, *, progress: float) -> Iterator[Part]:
        """What is asked of each teacher of a batch; their losses follow each other as ``names``."""
        for teacher in self.teachers:
            terms = [term for term in self.terms.values() if term.teacher == teacher]
            yield Part.of(
                batch if teacher is None else _answers(batch, teacher),
                [term.loss_at(progress) for term in terms],
                [term.weight.at(progress) for term in terms],
            )


@dataclass(frozen=True)
class Part:
    """The losses that listen to one teacher, and what they read of the student together."""

    batch: Batch
    losses: Sequence[Loss]
    weights: Sequence[float]
    places: Places
    readings: list[Reading]
    reading_of: list[int]

    @classmethod
    def of(cls, batch: Batch, losses: Sequence[Loss], weights: Sequence[float]) -> Part:
        """One reading of the student for each temperature."""
        wanted = [loss.reading(batch.signal) for loss in losses]
        temperatures = list(dict.fromkeys(one.temperature for one in wanted))
        readings = [_union(t, wanted) for t in temperatures]
        places = places_of(
            batch,
            labels=any(one.labels for one in wanted),
            entries=any(loss.uses_entries for loss in losses),
        )
        reading_of = [temperatures.index(one.temperature) for one in wanted]
        return cls(batch, losses, weights, places, readings, reading_of)

    def sums(self, students: Sequence[Student], signal: TorchSignal, weights_S: Tensor) -> Tensor:
        """[n]: the weighted sum over positions of each loss; of all of them, or a block's."""
        pairs = zip(self.losses, self.reading_of, strict=True)
        terms = [loss.terms(students[place], signal) for loss, place in pairs]
        return torch.stack([(one * weights_S.to(one.dtype)).sum() for one in terms])


def weighted(values_n: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ weight · value, a scalar.

    The weights stay numbers: a tensor of them would be copied to the device, which is waited for.
    """
    pairs = zip(values_n.unbind(), weights, strict=True)
    return torch.stack([value * weight for value, weight in pairs]).sum()


def check_rows(answers: Tensor, batch: Batch) -> None:
    """UsageError unless a model answered [..., X] for each token of the batch, and for no other."""
    rows, tokens = answers.shape[:-1].numel(), batch.input_ids.numel()
    if rows != tokens:
        raise UsageError(
            "the model did not give one answer to each token of the batch",
            expected=f"{tokens} rows, as input_ids has tokens",
            got=rows,
            todo="leave out what adds tokens or drops rows: prompt tuning, logits_to_keep",
        )


def divisor(batch: Batch, denominator: Tensor | float | None) -> Tensor | float:
    """The one denominator: the batch's scored positions, at least 1, unless it is given."""
    return max(len(batch.signal), 1) if denominator is None else denominator


def _union(temperature: float, readings: Iterable[Reading]) -> Reading:
    same = [one for one in readings if one.temperature == temperature]
    return Reading(temperature, any(one.outside for one in same), any(one.labels for one in same))


def _answers(batch: Batch, teacher: str) -> Batch:
    if teacher not in batch.teachers:
        raise UsageError(
            "a loss listens to a teacher that the data does not have",
            where="losses",
            expected=", ".join(batch.teachers) or "no teacher beside the main one",
            got=teacher,
            todo="join the teacher's store: teachers in the configuration, kdstore.Join in code",
        )
    return batch.of_teacher(teacher)


def _term(name: str, spec: Any) -> Term:
    """One of ``losses``: a weight, or a mapping of weight, loss, teacher and the loss's options."""
    where = f"losses.{name}"
    options = dict(spec) if isinstance(spec, Mapping) else {"weight": spec}
    kind = options.pop("loss", name)
    refuse_unknown([kind], LOSSES, where="losses")
    weight = make_schedule(options.pop("weight", 1.0), where=f"{where}.weight")
    teacher = options.pop("teacher", None)
    temperature = options.get("temperature")
    changing = None
    if isinstance(temperature, Mapping):
        changing = make_schedule(options.pop("temperature"), where=f"{where}.temperature")
        options["temperature"] = changing.start
    term = Term(build(LOSSES[kind], options, where=where), weight, changing, teacher)
    term.losses()  # refuses a temperature that ends below zero
    return term
