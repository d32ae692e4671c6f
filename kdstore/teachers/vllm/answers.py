"""How a sample's answer is asked of an engine, and read from it: by the tap, or from logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kdstore.audit import AUDIT_SELECTION
from kdstore.errors import TeacherError
from kdstore.hashing import sample_hash
from kdstore.sample import Sample
from kdstore.signal import SparseSignal
from kdstore.teachers.top_logprobs import TopLogprobs, padding_mass, signal_of
from kdstore.teachers.vllm.packing import Answered, Tally, unpack
from kdstore.teachers.vllm.request import TapRequest, TapRule

MIN_SHARED_PREFIX = 16  # tokens: vLLM's smallest cache block


@dataclass(frozen=True, eq=False)
class Asked:
    """A sample on its way through the engine; ``output`` is the engine's, once it is done."""

    key: int
    sample: Sample
    fresh: bool
    output: Any = None


class Answers(Protocol):
    """How samples are asked and answered."""

    runner: str
    tally: Tally

    def params(self, asked: Asked, rule: TapRule) -> Any:
        """The ``SamplingParams`` of a sample."""
        ...

    def collect(self, done: Sequence[Asked], rule: TapRule) -> list[Answered]:
        """The answers of samples that the engine is done with, in their order."""
        ...


class TapAnswers:
    """Answers that workers keep until they are fetched."""

    def __init__(self, engine: Any, *, vocab_size: int) -> None:
        self._engine = engine
        runners = engine.collective_rpc("kdstore_install", args=(vocab_size,))
        self.runner: str = runners[-1]
        self.tally = Tally()

    @staticmethod
    def params(asked: Asked, rule: TapRule) -> Any:
        """Nothing of vLLM's own log-probabilities; a cached prefix is used if nobody scores it."""
        from vllm import SamplingParams

        request = TapRequest(
            key=asked.key,
            rule=rule,
            sample_hash=sample_hash(asked.sample.sample_id),
            runs=asked.sample.runs,
        )
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            skip_reading_prefix_cache=asked.fresh,
            extra_args=request.to_extra_args(),
        )

    def collect(self, done: Sequence[Asked], rule: TapRule) -> list[Answered]:
        """TeacherError with what a worker met, if it could not select."""
        blobs = self._engine.collective_rpc("kdstore_take", args=([one.key for one in done],))
        found = [unpack(b, selection=rule.selection, audit=AUDIT_SELECTION) for b in blobs]
        # One rank of the last pipeline stage has logits; all others come with nothing.
        answers, tally = max(found, key=lambda pair: sum(len(a.positions_S) for a in pair[0]))
        for _, other in found:
            if other.error:
                raise TeacherError("a worker of the engine could not select", got=other.error)
        self.tally = tally
        return answers


class LogprobAnswers:
    """Answers from vLLM's flat prompt log-probabilities: ``topk``, without a tap.

    See ``signal_of`` for what is not exact about them.
    """

    runner = "none"

    def __init__(self, *, k: int) -> None:
        self._k = k
        self.tally = Tally()

    def params(self, asked: Asked, rule: TapRule) -> Any:
        """The stock path: prompt log-probabilities, flat and without text."""
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=self._k,
            flat_logprobs=True,
        )

    def collect(self, done: Sequence[Asked], rule: TapRule) -> list[Answered]:
        """The signals of what the engine said of samples."""
        tops = [self._top_logprobs(one) for one in done]
        positions = sum(one.sample.num_scored for one in done)
        padding = sum(float(padding_mass(top, rule.num_ids).sum()) for top in tops)
        self.tally = Tally(num_positions=positions, padding_mass=padding)
        none = SparseSignal.empty(AUDIT_SELECTION)
        signals = [
            signal_of(top, rule.selection, rule.scalars, num_ids=rule.num_ids) for top in tops
        ]
        pairs = zip(done, signals, strict=True)
        return [Answered(one.sample.positions_S, signal, none) for one, signal in pairs]

    def _top_logprobs(self, one: Asked) -> TopLogprobs:
        """The first entry of a position is its token's own; the k most probable follow."""
        flat = one.output.prompt_logprobs
        starts_S = np.array(flat.start_indices, np.int64)[one.sample.positions_S]
        at_SK = starts_S[:, None] + 1 + np.arange(self._k)
        logprobs_N = np.array(flat.logprobs, np.float64)
        return TopLogprobs(
            np.array(flat.token_ids, np.int64)[at_SK],
            logprobs_N[at_SK],
            logprobs_N[starts_S],
            np.array(flat.ranks, np.float64)[starts_S],
        )
