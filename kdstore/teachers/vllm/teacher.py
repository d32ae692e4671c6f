"""The ``vllm`` teacher: samples through an engine, signals out of its workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from kdstore.completion import Completion, Prompt, Sampling
from kdstore.errors import TeacherError
from kdstore.sample import Sample
from kdstore.select import DEFAULT_SCALARS, Selection
from kdstore.teacher import Score
from kdstore.teachers.hf_load import CheckpointInfo
from kdstore.teachers.vllm.answers import MIN_SHARED_PREFIX, Answers, Asked
from kdstore.teachers.vllm.engine import engine_errors
from kdstore.teachers.vllm.generate import generate
from kdstore.teachers.vllm.request import TapRule

FETCH_POSITIONS = 1 << 14  # answers fetched at once: a few MB, and one pause of the engine
SHUTDOWN_S = 30.0  # then its processes are killed
REQUESTS_PER_SLOT = 2  # requests given to the engine for each that it runs at once


class VLLMTeacher:
    """Scores samples with an engine, whose scheduler batches them as it likes.

    ``num_ids`` is how many ids the tokenizer has; logits beyond are vocabulary padding.
    """

    def __init__(
        self, info: CheckpointInfo, engine: Any, answers: Answers, *, num_ids: int
    ) -> None:
        self.info, self.vocab_size = info, info.vocab_size
        self.num_ids = min(num_ids, info.vocab_size)
        self._engine, self._answers = engine, answers
        self._asked = 0
        self._limit = REQUESTS_PER_SLOT * engine.vllm_config.scheduler_config.max_num_seqs
        self._totals = {"positions": 0, "padding_mass": 0.0}

    def score(
        self,
        samples: Sequence[Sample],
        selection: Selection,
        *,
        scalars: Sequence[str] = DEFAULT_SCALARS,
        seed: int = 0,
        draw: int = 0,
        audit_fraction: float = 0.0,
    ) -> Iterator[Score]:
        """The score of each sample that has scored positions, as the engine finishes them."""
        rule = TapRule(
            selection=selection.spec,
            scalars=tuple(scalars),
            seed=seed,
            draw=draw,
            audit_fraction=audit_fraction,
            num_ids=self.num_ids,
        )
        waiting = (self._ask(sample) for sample in samples if sample.num_scored)
        flying: dict[str, Asked] = {}
        try:
            yield from self._answered(waiting, flying, rule)
        finally:
            if flying:
                self._engine.abort_request(list(flying))

    def generate(
        self, groups: Iterable[Sequence[Prompt]], sampling: Sampling
    ) -> Iterator[Completion]:
        """One completion of each prompt, as the engine finishes them."""
        padding_ids = range(self.num_ids, self.vocab_size)
        yield from generate(
            self._engine, groups, sampling, limit=self._limit, padding_ids=padding_ids
        )

    def provenance(self) -> dict[str, Any]:
        """Versions, runner and mean probability of vocabulary padding since the last call."""
        import vllm

        totals, self._totals = self._totals, {"positions": 0, "padding_mass": 0.0}
        parallel = self._engine.vllm_config.parallel_config
        return {
            "backend": "vllm",
            "device": self._engine.vllm_config.device_config.device_type,
            "torch": torch.__version__,
            "vllm": vllm.__version__,
            "runner": self._answers.runner,
            "parallel": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
            "padding_mass": totals["padding_mass"] / max(totals["positions"], 1),
        }

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.engine_core.shutdown(timeout=SHUTDOWN_S)

    def _answered(
        self, waiting: Iterator[Asked], flying: dict[str, Asked], rule: TapRule
    ) -> Iterator[Score]:
        done: list[Asked] = []
        while True:
            for asked in islice(waiting, max(0, self._limit - len(flying))):
                self._submit(asked, flying, rule)
            if flying:
                done += self._step(flying)
            if done and (not flying or _positions(done) >= FETCH_POSITIONS):
                finished, done = done, []
                yield from self._fetch(finished, flying, rule)
            if not flying and not done:
                return

    def _ask(self, sample: Sample) -> Asked:
        self._asked += 1
        first = int(sample.positions_S[0])
        return Asked(self._asked, sample, fresh=first <= MIN_SHARED_PREFIX)

    def _submit(self, asked: Asked, flying: dict[str, Asked], rule: TapRule) -> None:
        from vllm.exceptions import VLLMValidationError

        prompt = {"type": "token", "prompt_token_ids": asked.sample.input_ids_T.tolist()}
        name = f"kdstore-{asked.key}"
        try:
            self._engine.add_request(name, prompt, self._answers.params(asked, rule))
        except (ValueError, VLLMValidationError) as error:
            raise TeacherError(
                "vLLM does not take a sample",
                where=f"sample {asked.sample.sample_id!r}",
                expected=f"at most {self._engine.vllm_config.model_config.max_model_len - 1} tokens"
                f", ids below {self.vocab_size}",
                got=f"{asked.sample.num_tokens} tokens ({error})",
                todo="split long samples with --max-length",
            ) from error
        flying[name] = asked

    def _step(self, flying: dict[str, Asked]) -> list[Asked]:
        """Wait for the engine; what it has finished."""
        with engine_errors():
            outputs = self._engine.step()
        return [
            replace(flying.pop(output.request_id), output=output)
            for output in outputs
            if output.finished
        ]

    def _fetch(
        self, done: Sequence[Asked], flying: dict[str, Asked], rule: TapRule
    ) -> Iterator[Score]:
        """Scores of finished samples; one that lost rows to the prefix cache is asked again."""
        with engine_errors():
            answers = self._answers.collect(done, rule)
        self._totals["positions"] += self._answers.tally.num_positions
        self._totals["padding_mass"] += self._answers.tally.padding_mass
        for asked, answered in zip(done, answers, strict=True):
            sample = asked.sample
            if np.array_equal(answered.positions_S, sample.positions_S):
                yield Score(sample.sample_id, answered.signal, answered.audit)
            elif asked.fresh:
                raise TeacherError(
                    "the engine left positions unanswered",
                    where=f"sample {sample.sample_id!r}",
                    expected=f"{sample.num_scored} positions",
                    got=len(answered.positions_S),
                )
            else:
                self._submit(replace(self._ask(sample), fresh=True), flying, rule)


def _positions(done: Sequence[Asked]) -> int:
    return sum(asked.sample.num_scored for asked in done)
