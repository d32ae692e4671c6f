"""Signals of a teacher for some texts, and of each entry what the teacher itself said.

What rate.py and rate_variants.py measure from. Texts are cut at 512 tokens, so that the
positions are of many texts; where not all are taken, which ones goes by the hash of their ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdstore.codecs import IdOrder, Positions
from kdstore.codecs.counting import OrderBuilder
from kdstore.hashing import RowKeys, sample_hash
from kdstore.select import DEFAULT_SCALARS, parse_selection, select
from kdstore.signal import SparseSignal, segment_sum
from kdstore.teachers.hf_load import describe_checkpoint, load_model, load_tokenizer

MAX_LENGTH = 512
QUICK_POSITIONS = 8_000
SELECTIONS = {
    "pps06": "pps:tau=0.06",
    "pps16": "pps:tau=0.16",
    "counts50": "counts:n=50",
    "topk50": "topk:k=50",
    "topp95": "topp:p=0.95,max_k=100",
}


@dataclass(frozen=True, eq=False)
class Text:
    """A text's id and tokens; all but the first are scored."""

    sample_id: str
    ids_T: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Scored:
    """Signals of S positions under each selection, and what variance needs of the teacher.

    * ``teacher_N`` float32: the teacher's probability of each entry of a selection's signal
    * ``squares_S`` float64: sum of the squares of the teacher's distribution
    """

    texts: list[Text]
    vocab_size: int
    signals: dict[str, SparseSignal]
    teacher_N: dict[str, NDArray[np.float32]]
    squares_S: NDArray[np.float64]

    @property
    def positions(self) -> Positions:
        """All positions, text by text, with the keys that a dump gives them."""
        previous = np.concatenate([text.ids_T[:-1] for text in self.texts])
        splits = np.cumsum([0, *(len(text.ids_T) - 1 for text in self.texts)], dtype=np.int64)
        return Positions(keys_of(self.texts), splits, previous)

    def order(self) -> IdOrder:
        """The id order that a dump of the texts makes."""
        return order_of(self.texts, self.vocab_size)

    def variance(self, name: str, signal: SparseSignal) -> float:
        """Mean over positions of the squared distance of a signal to the teacher's distribution.

        ``signal`` has entries of the named selection's signal, with any values: the sum over the
        vocabulary is that over its entries, plus the teacher's squares elsewhere.
        """
        teacher = self.teacher_N[name][find_entries(self.signals[name], signal)]
        entries = np.exp(signal.logprobs_N.astype(np.float64))
        sums = segment_sum(entries * (entries - 2 * teacher), signal.indptr)
        return float((sums + self.squares_S).mean())

    def rounds_variance(self, rounds: int) -> float:
        """What multinomial rounds have in expectation."""
        return float((1 - self.squares_S).mean() / rounds)


def read_texts(
    teacher: str, texts: Path, *, positions: int | None, max_length: int | None = MAX_LENGTH
) -> list[Text]:
    """All texts, or as many, by the hash of their ids, as have enough positions."""
    tokenizer = load_tokenizer(Path(teacher))
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    found: list[Text] = []
    left = sys.maxsize if positions is None else positions
    for row in sorted(rows, key=lambda row: sample_hash(str(row["id"]))):
        ids = tokenizer(row["text"], verbose=False)["input_ids"][:max_length]
        if len(ids) > 1 and left > 0:
            found.append(Text(str(row["id"]), np.array(ids, dtype=np.int32)))
            left -= len(ids) - 1
    return found


def order_of(texts: Iterable[Text], vocab_size: int) -> IdOrder:
    """The id order that a dump of some texts makes."""
    builder = OrderBuilder(vocab_size)
    for text in texts:
        builder.add(text.ids_T)
    return builder.build()


def keys_of(texts: Iterable[Text]) -> RowKeys:
    """What the random numbers of all scored positions are made of."""
    samples = [(text.sample_id, np.arange(1, len(text.ids_T))) for text in texts]
    return RowKeys.of_samples(samples, seed=0)


def logits_of(teacher: str, texts: Iterable[Text]) -> Iterator[tuple[Text, torch.Tensor]]:
    """Each text and the float32 logits [S, V] of its scored positions."""
    model = load_model(describe_checkpoint(teacher, device="cpu"), device="cpu")
    for text in texts:
        with torch.inference_mode():
            ids = torch.from_numpy(text.ids_T.astype(np.int64))
            yield text, model(ids[None]).logits[0, :-1].float()


def score(teacher: str, texts: list[Text]) -> Scored:
    """All selections of all texts."""
    signals: dict[str, list[SparseSignal]] = {name: [] for name in SELECTIONS}
    at_entries: dict[str, list[NDArray[np.float32]]] = {name: [] for name in SELECTIONS}
    squares, vocab_size = [], 0
    for text, logits in logits_of(teacher, texts):
        vocab_size = logits.shape[1]
        labels = torch.from_numpy(text.ids_T[1:].astype(np.int64))
        p_SV = logits.softmax(-1)
        squares.append(p_SV.square().sum(-1).double().numpy())
        for name, spec in SELECTIONS.items():
            scalars = DEFAULT_SCALARS
            rule, keys = parse_selection(spec), keys_of([text])
            signal = select(logits, labels, selection=rule, keys=keys, scalars=scalars)
            signals[name].append(signal)
            at_entries[name].append(p_SV.numpy()[signal.rows_N, signal.ids_N])
    return Scored(
        texts,
        vocab_size,
        {name: SparseSignal.concat(parts) for name, parts in signals.items()},
        {name: np.concatenate(parts) for name, parts in at_entries.items()},
        np.concatenate(squares),
    )


def find_entries(whole: SparseSignal, part: SparseSignal) -> NDArray[np.int64]:
    """int64 [N]: where each entry of ``part`` is among those of ``whole``."""
    keys, wanted = (signal.rows_N * (1 << 32) + signal.ids_N for signal in (whole, part))
    found = np.searchsorted(keys, wanted)
    if not np.array_equal(keys[found], wanted):
        raise AssertionError("what was decoded has entries that were not selected")
    return found


def squared_distance(a: SparseSignal, b: SparseSignal) -> float:
    """Mean over positions of the squared distance; ``b``'s entries are among ``a``'s."""
    values = np.exp(a.logprobs_N.astype(np.float64))
    values[find_entries(a, b)] -= np.exp(b.logprobs_N.astype(np.float64))
    return float(np.square(values).sum() / len(a))


def kl_of_rounding(signal: SparseSignal, decoded: SparseSignal) -> float:
    """Mean KL, in nats, of entries and rest before rounding to entries and rest after it."""
    entries = np.exp(signal.logprobs_N.astype(np.float64))
    rest = np.exp(signal.rest_S.astype(np.float64))
    total = segment_sum(entries, signal.indptr) + rest
    entries, rest = entries / total[signal.rows_N], rest / total
    terms = segment_sum(entries * (np.log(entries) - decoded.logprobs_N), signal.indptr)
    some = rest > 0
    terms[some] += rest[some] * (np.log(rest[some]) - decoded.rest_S[some])
    return float(terms.mean())
