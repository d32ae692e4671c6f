"""What a teacher that also writes is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import UsageError
from kdstore.hashing import Purpose, hash_fields, sample_hash
from kdstore.teacher import Teacher

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn from prompts, ``num_samples`` of each.

    Logits are divided by ``temperature`` (0: the most probable token), then the fewest tokens whose
    mass reaches ``top_p`` are drawn from. A completion ends with the first of ``stop_ids``, which
    it keeps, or after ``max_tokens``. Raises UsageError for what is no such number.
    """

    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self.num_samples >= 1, "--num-samples", "1 or more", self.num_samples)
        _check(self.max_tokens >= 1, "--max-new-tokens", "1 or more", self.max_tokens)
        _check(0 < self.top_p <= 1, "--top-p", "above 0, at most 1", self.top_p)
        warm = self.temperature == 0 or 0.01 <= self.temperature <= 100
        _check(warm, "--temperature", "0, or 0.01 to 100", self.temperature)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids to go on from, by at most ``max_tokens``.

    ``sample_id`` is that of the sample that prompt and completion will be: all draws are keyed by
    it, so several completions of one text have several ids.
    """

    sample_id: str
    input_ids_T: NDArray[np.int32]
    max_tokens: int

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.input_ids_T)

    def engine_seed(self, *, seed: int) -> int:
        """63 bits, for an engine that draws by itself."""
        bits = hash_fields(seed, sample_hash(self.sample_id), int(Purpose.GENERATION))
        return int(bits[0]) >> 1


@dataclass(frozen=True, eq=False)
class Completion:
    """The tokens ``ids_T`` (int32) that followed a prompt, as they were drawn."""

    sample_id: str
    ids_T: NDArray[np.int32]
    finish_reason: FinishReason


class GeneratingTeacher(Teacher, Protocol):
    """A teacher that completes prompts as well."""

    def generate(
        self, groups: Iterable[Sequence[Prompt]], sampling: Sampling
    ) -> Iterator[Completion]:
        """One completion of each prompt, in any order.

        Groups are taken one after the other, as there is room for them. Where prompts are computed
        in batches of fixed shape, no batch crosses a group: what is drawn in one does not depend
        on which others are asked. Raises TeacherError if the teacher gives no distribution.
        """
        ...


def _check(good: bool, option: str, expected: str, got: Any) -> None:
    if not good:
        raise UsageError("completions cannot be drawn so", where=option, expected=expected, got=got)
