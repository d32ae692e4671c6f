"""The contract of a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kdstore.sample import Sample
from kdstore.signal import SparseSignal

if TYPE_CHECKING:
    from kdstore.select import Selection


@dataclass(frozen=True, eq=False)
class Score:
    """What a teacher said of one sample.

    ``signal`` is of its scored positions, ``audit`` of those of them that are audited: ``full``,
    without scalars, from the same logits.
    """

    sample_id: str
    signal: SparseSignal
    audit: SparseSignal


class Teacher(Protocol):
    """Anything that can say, of each scored position, what it held likely there.

    ``vocab_size`` is the width of its logits. It answers each sample once, in any order, holding no
    more than a bounded number in flight.
    """

    vocab_size: int

    def score(
        self,
        samples: Sequence[Sample],
        selection: Selection,
        *,
        scalars: Sequence[str],
        seed: int,
        draw: int = 0,
        audit_fraction: float = 0.0,
    ) -> Iterator[Score]:
        """The score of each sample; ``kdstore.audit`` says which positions are audited.

        ``draw`` numbers independent draws of a sampled selection.

        Raises TeacherError if the teacher gives what is no distribution.
        """
        ...

    def close(self) -> None:
        """Free what it holds outside this process's memory; it is not asked again."""
        return

    def provenance(self) -> dict[str, Any]:
        """What a commit records: device, versions, mass lost to padding since the last call."""
        ...
