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

    def params(self, asked: Asked, rule: TapRule) -> Any:
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

    About 13 us of Python a token at k = 64. The mass outside the entries is what the entries leave
    of one, in float32: nothing better is known.
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
        """The first entry of a position is its token's own; the k most probable follow."""
        self.tally = Tally(num_positions=sum(one.sample.num_scored for one in done))
        return [self._answered(one, rule) for one in done]

    def _answered(self, one: Asked, rule: TapRule) -> Answered:
        flat, positions = one.output.prompt_logprobs, one.sample.positions_S
        starts = np.array(flat.start_indices, np.int64)[positions]
        at_SK = starts[:, None] + 1 + np.arange(self._k)
        ids_SK = np.array(flat.token_ids, np.int64)[at_SK]
        logprobs_SK = np.array(flat.logprobs, np.float32)[at_SK]
        if len(ids_SK) and ids_SK.max() >= rule.num_ids:
            raise self._padding_error(one, int(ids_SK.max()), rule.num_ids)
        order = ids_SK.argsort(axis=1)
        known = {
            "label_logprob": np.array(flat.logprobs, np.float32)[starts],
            "label_rank": np.array(flat.ranks, np.float32)[starts],
        }
        signal = SparseSignal.from_arrays(
            rule.selection,
            np.arange(len(positions) + 1) * self._k,
            np.take_along_axis(ids_SK, order, 1).ravel(),
            np.take_along_axis(logprobs_SK, order, 1).ravel(),
            rest_S=rest_of(logprobs_SK),
            scalars={name: known[name] for name in rule.scalars},
        )
        return Answered(positions, signal, SparseSignal.empty(AUDIT_SELECTION))

    def _padding_error(self, one: Asked, found: int, num_ids: int) -> TeacherError:
        return TeacherError(
            "the teacher holds an id likely that its tokenizer does not have",
            where=f"sample {one.sample.sample_id!r}",
            expected=f"ids below {num_ids} among the {self._k} most probable",
            got=found,
            todo="use the tap or the hf backend, which leave vocabulary padding out",
        )


def rest_of(logprobs_SK: Any) -> Any:
    """float32 [S]: log of what the entries leave of one; -inf where rounding leaves nothing."""
    kept_S = np.exp(logprobs_SK.astype(np.float64)).sum(1)
    with np.errstate(divide="ignore"):
        return np.log1p(-np.minimum(kept_S, 1.0)).astype(np.float32)
