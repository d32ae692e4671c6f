"""The prompts of a source, and what reading all of them tells before the teacher is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kdstore.completion import Prompt, Sampling
from kdstore.errors import InputError
from kdstore.generate.settings import Settings
from kdstore.inputs import Row, Source
from kdstore.inputs.config import Overlong
from kdstore.inputs.prompts import PromptBuilder
from kdstore.progress import Progress
from kdstore.sample import Sample
from kdstore.writers.plan import make_plan

_NAMED = 5  # prompts without room that are named


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptSource:
    """Where prompts come from, and how much room they have: ``max_length`` with the completion."""

    rows: Source
    builder: PromptBuilder
    max_length: int | None
    overlong: Overlong

    def read(self, row: int, content: Row) -> list[Sample]:
        """The prompt of a row, if it has one with room for an answer."""
        return [p for p in self.builder.samples(row, content) if self.has_room(p)]

    def has_room(self, prompt: Sample) -> bool:
        """Whether a token may follow; InputError if there is none and long rows are refused."""
        room = self.max_length is None or prompt.num_tokens < self.max_length
        if not room and self.overlong == "error":
            raise InputError(
                "a prompt leaves no room for an answer",
                where=f"{self.rows.location}, sample {prompt.sample_id!r}",
                expected=f"fewer than {self.max_length} tokens",
                got=prompt.num_tokens,
                todo="raise max_length, or leave such prompts out with another --overlong",
            )
        return room

    def requests(self, prompt: Sample, sampling: Sampling) -> list[Prompt]:
        """What the teacher is asked: ``num_samples`` completions, named ``{prompt}#{k}``."""
        room = sampling.max_tokens
        if self.max_length is not None:
            room = min(room, self.max_length - prompt.num_tokens)
        return [
            Prompt(f"{prompt.sample_id}#{k}", prompt.input_ids_T, room)
            for k in range(sampling.num_samples)
        ]


def survey(
    source: PromptSource, identity: dict[str, Any], *, vocab_size: int, quiet: bool
) -> Settings:
    """The settings of new completions, from one pass over all prompts, without the teacher.

    Finds what is wrong with any row. Prompts without room are counted and some of them named.
    """
    named: list[str] = []

    def checked(progress: Progress) -> Iterator[tuple[int, list[Sample]]]:
        for row, content in source.rows.rows():
            prompts = source.builder.samples(row, content)
            named.extend(p.sample_id for p in prompts if not source.has_room(p))
            yield row, prompts
            progress.advance(1)

    with Progress("prompts", total=None, unit="rows", quiet=quiet) as progress:
        plan, _ = make_plan(
            checked(progress), unit_tokens=1, vocab_size=vocab_size, where=source.rows.location
        )
    if named:
        print(
            f"kdstore: warning: {len(named)} prompts leave no room for an answer within "
            f"{source.max_length} tokens and are left out: {', '.join(named[:_NAMED])}"
            f"{', …' if len(named) > _NAMED else ''}",
            file=sys.stderr,
        )
    rows, prompts = source.builder.counters.num_rows, len(plan.table)
    return Settings(identity, rows, prompts - len(named), len(named))
