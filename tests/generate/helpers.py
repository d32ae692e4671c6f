"""A teacher that needs no model: what it answers depends on the sample's id alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.completion import Completion, Prompt, Sampling
from kdstore.filesystem import Folder
from kdstore.generate.prompts import PromptSource
from kdstore.generate.stage import Generation, open_generation
from kdstore.hashing import sample_hash
from kdstore.inputs import InputConfig, open_source
from kdstore.inputs.config import Overlong
from kdstore.inputs.prompts import PromptBuilder
from tests.conftest import write_jsonl

NUM_IDS = 320


class StoppedError(Exception):
    """Raised in the middle of generating."""


class FakeTeacher:
    """Answers two groups at a time, backwards, as an engine might; stops after ``limit``."""

    def __init__(self, *, limit: int | None = None) -> None:
        self.limit, self.asked = limit, list[str]()

    def generate(
        self, groups: Iterable[Sequence[Prompt]], sampling: Sampling
    ) -> Iterator[Completion]:
        waiting: list[Prompt] = []
        for index, group in enumerate(groups):
            waiting += group
            if index % 2:
                yield from self._answers(waiting)
                waiting = []
        yield from self._answers(waiting)

    def _answers(self, prompts: list[Prompt]) -> Iterator[Completion]:
        for prompt in reversed(prompts):
            if len(self.asked) == self.limit:
                raise StoppedError
            self.asked.append(prompt.sample_id)
            yield answer_to(prompt)


def answer_to(prompt: Prompt) -> Completion:
    count = sample_hash(prompt.sample_id) % 9 + 1
    reason = "stop" if count <= prompt.max_tokens else "length"
    ids_T = np.full(min(count, prompt.max_tokens), count, np.int32)
    return Completion(prompt.sample_id, ids_T, reason)  # type: ignore[arg-type]


def prompt_rows(count: int = 10) -> list[dict[str, Any]]:
    return [
        {"id": f"p{n}", "input_ids": list(range(3, 4 + n)), "metadata": {"n": n}}
        for n in range(count)
    ]


def open_at(
    folder: Path,
    data: Path,
    tokenizer: Any,
    *,
    max_length: int | None = 40,
    overlong: Overlong = "split",
    identity: dict[str, Any] | None = None,
) -> Generation:
    rows = open_source(data)
    builder = PromptBuilder(tokenizer, InputConfig(), rows.name, locate=rows.locate)
    source = PromptSource(rows=rows, builder=builder, max_length=max_length, overlong=overlong)
    sampling = Sampling(num_samples=2, max_tokens=6)
    settings = {"block_rows": 3, "seed": 0, "prompts": rows.fingerprint(), **(identity or {})}
    return open_generation(
        Folder(folder), source, sampling, settings, vocab_size=NUM_IDS, quiet=True
    )


def data_of(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    return write_jsonl(folder / "data" / "prompts.jsonl", rows)
