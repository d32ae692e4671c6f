"""The ``openai`` teacher: top-k log-probabilities from a vLLM or SGLang server."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from kdstore.audit import AUDIT_SELECTION
from kdstore.errors import UsageError
from kdstore.sample import Sample
from kdstore.select import Selection, SelectionStats
from kdstore.select.topk import TopK
from kdstore.signal import SparseSignal
from kdstore.teacher import Score
from kdstore.teachers.hf_load import CheckpointInfo
from kdstore.teachers.openai_answers import Flavour
from kdstore.teachers.openai_client import open_session
from kdstore.teachers.openai_options import ServerOptions
from kdstore.teachers.top_logprobs import TopLogprobs, padding_mass, signal_of

MAX_ENTRIES_IN_FLIGHT = 1 << 23  # at up to 85 bytes of JSON each: 0.7 GB


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model of a server: how it is asked, its name there, and the server's version."""

    options: ServerOptions
    flavour: Flavour
    model: str
    version: str | None


class OpenAITeacher:
    """Scores samples by requests, one each, several in flight.

    ``num_ids`` is how many ids the tokenizer has: entries beyond are vocabulary padding.
    """

    def __init__(self, info: CheckpointInfo, served: Served, *, num_ids: int | None = None) -> None:
        self.info, self.served = info, served
        self.vocab_size = info.vocab_size
        self.num_ids = min(num_ids or info.vocab_size, info.vocab_size)
        self.stats = SelectionStats()

    def score(
        self,
        samples: Sequence[Sample],
        selection: Selection,
        *,
        scalars: Sequence[str] | None = None,
        seed: int = 0,
        draw: int = 0,
        audit_fraction: float = 0.0,
    ) -> Iterator[Score]:
        """The score of each sample that has scored positions, in the order of the answers."""
        del seed, draw  # nothing is drawn
        flavour = self.served.flavour
        names = flavour.scalars if scalars is None else tuple(scalars)
        k = min(
            checked_k(selection, names, flavour=flavour, audit_fraction=audit_fraction),
            self.vocab_size,
        )
        self.info.check_lengths(samples)
        no_audit = SparseSignal.empty(AUDIT_SELECTION)
        with open_session(self.served.options) as session:

            def ask(sample: Sample) -> Future[TopLogprobs]:
                body = flavour.body(sample, model=self.served.model, k=k)
                read = partial(flavour.read, sample=sample, k=k, vocab_size=self.vocab_size)
                return session.ask(
                    flavour.path, body, read=read, where=f"sample {sample.sample_id!r}"
                )

            wanted = (sample for sample in samples if sample.num_scored)
            limit = self.served.options.concurrency
            for sample, answer in answers(wanted, ask, concurrency=limit, k=k):
                signal = self._signal(answer, selection.spec, names)
                yield Score(sample.sample_id, signal, no_audit)

    def close(self) -> None:
        """Nothing: connections are closed when scoring ends."""

    def provenance(self) -> dict[str, Any]:
        """The server, and the mean probability of entries of padding since the last call."""
        stats, self.stats = self.stats, SelectionStats()
        return {
            "backend": "openai",
            "flavour": self.served.flavour.name,
            "server_version": self.served.version,
            "model": self.served.model,
            "padding_mass": stats.padding_mass / max(stats.num_positions, 1),
        }

    def _signal(self, answer: TopLogprobs, spec: str, scalars: Sequence[str]) -> SparseSignal:
        padding_S = padding_mass(answer, self.num_ids)
        self.stats.num_positions += len(padding_S)
        self.stats.padding_mass += float(padding_S.sum())
        return signal_of(answer, spec, scalars, num_ids=self.num_ids)


def answers(
    samples: Iterable[Sample],
    ask: Callable[[Sample], Future[TopLogprobs]],
    *,
    concurrency: int,
    k: int,
) -> Iterator[tuple[Sample, TopLogprobs]]:
    """Each sample with its answer, as they come; what is in flight is bounded in number and size.

    A sample whose entries are more than ``MAX_ENTRIES_IN_FLIGHT`` is alone in flight.
    """
    waiting, pending = deque(samples), dict[Future[TopLogprobs], Sample]()
    entries = 0
    try:
        while waiting or pending:
            while waiting and len(pending) < concurrency:
                size = waiting[0].num_tokens * k
                if pending and entries + size > MAX_ENTRIES_IN_FLIGHT:
                    break
                sample = waiting.popleft()
                pending[ask(sample)] = sample
                entries += size
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                sample = pending.pop(future)
                entries -= sample.num_tokens * k
                yield sample, future.result()
    finally:
        for future in pending:
            future.cancel()


def checked_k(
    selection: Selection, scalars: Sequence[str], *, flavour: Flavour, audit_fraction: float
) -> int:
    """The k of a selection; UsageError for anything that needs more than top-k logprobs."""
    wanted = {
        f"the selection {selection.spec}": not isinstance(selection, TopK),
        f"an audit of {audit_fraction}": audit_fraction > 0,
        **{f"the scalar {name}": name not in flavour.scalars for name in scalars},
    }
    refuse_full_logits(wanted, expected=f"topk:k=… with {' and '.join(flavour.scalars)}")
    assert isinstance(selection, TopK)
    return selection.k


def refuse_full_logits(wanted: Mapping[str, bool], *, expected: str) -> None:
    """UsageError for the first thing that is wanted: a server cannot give any of them."""
    for what, is_wanted in wanted.items():
        if is_wanted:
            raise UsageError(
                f"{what} needs full logits, and a server gives the most probable tokens",
                where="backend openai",
                expected=expected,
                todo="use a backend that has full logits: hf or vllm",
            )
