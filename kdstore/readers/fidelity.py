"""How faithful a store's decoded signal is to its teacher, measured at the audited positions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdstore.errors import CorruptShardError, UsageError
from kdstore.layout import AUDIT_SIGNAL, MAIN_SIGNAL
from kdstore.readers import measures
from kdstore.readers.store import Store
from kdstore.select import parse_selection
from kdstore.signal import SparseSignal

CHUNK_ELEMENTS = 1 << 22  # 32 MB of float64

Floats = NDArray[np.float64]


def store_fidelity(store: Store) -> dict[str, Any]:
    """What decoding gives against what the teacher said, ready for JSON.

    ``num_audited`` positions, ``kept_mass`` of the decoded entries, then means over the positions.
    Of ``topk``, ``topp`` and ``full`` ``kl_quantisation`` and ``kl_truncation``, in nats; of
    ``pps`` and ``counts`` the gradient's bias and variance. ``readers.measures`` has the formulas.
    Raises UsageError if no position was audited.
    """
    spec = store.header.identity["signals"][MAIN_SIGNAL]["selection"]
    selection = parse_selection(spec)
    figures = SampledFigures(store.vocab_size) if selection.sampled else RankedFigures()
    kept_mass, num_audited = 0.0, 0
    for signal, teacher_CV in audited_positions(
        store, temperature=getattr(selection, "temperature", 1.0)
    ):
        figures.add(signal, teacher_CV)
        kept_mass += float(signal.kept_mass_S.sum())
        num_audited += len(signal)
    if not num_audited:
        raise _no_audit(store, f"no audited position among {len(store)} samples")
    return {
        "num_audited": num_audited,
        "kept_mass": kept_mass / num_audited,
        **figures.summary(),
    }


def audited_positions(store: Store, *, temperature: float) -> Iterator[tuple[SparseSignal, Floats]]:
    """Decoded signal and teacher's probabilities float64 [C, V] of the audited positions.

    A bounded number of positions at a time. The teacher is softmax(log-probabilities /
    ``temperature``).
    """
    if AUDIT_SIGNAL not in store.header.identity["signals"]:
        raise _no_audit(store, "no audit")
    main, audit = store.with_signal(MAIN_SIGNAL), store.with_signal(AUDIT_SIGNAL)
    rows_per_chunk = max(1, CHUNK_ELEMENTS // store.vocab_size)
    for index, audited in enumerate(audit):
        if audited.signal is None or not audited.num_scored:
            continue
        sample = main[index]
        rows = np.flatnonzero(np.isin(sample.positions_S, audited.positions_S))
        if sample.signal is None or len(rows) != audited.num_scored:
            raise CorruptShardError(
                "a position is audited that is not scored",
                where=f"{store.folder.url}, sample {sample.sample_id!r}",
                expected=f"{audited.num_scored} scored positions",
                got=len(rows),
            )
        for start in range(0, len(rows), rows_per_chunk):
            part = slice(start, start + rows_per_chunk)
            teacher_CV = _probabilities(
                audited.signal[part], store.vocab_size, temperature=temperature
            )
            yield sample.signal[rows[part]], teacher_CV


class RankedFigures:
    """The divergences of signals that keep the likeliest tokens."""

    def __init__(self) -> None:
        self._values: dict[str, list[Floats]] = defaultdict(list)

    def add(self, signal: SparseSignal, teacher_CV: Floats) -> None:
        """Take in some positions."""
        self._values["kl_quantisation"].append(measures.quantisation_kl(signal, teacher_CV))
        self._values["kl_truncation"].append(measures.truncation_kl(signal, teacher_CV))

    def summary(self) -> dict[str, Any]:
        """``mean``, ``p99`` (99 of 100 positions are below) and ``max`` of each."""
        return {name: _spread(np.concatenate(parts)) for name, parts in self._values.items()}


class SampledFigures:
    """Bias and variance of signals that are drawn."""

    def __init__(self, vocab_size: int) -> None:
        self._values: dict[str, list[Floats]] = defaultdict(list)
        self._signal_V = np.zeros(vocab_size)
        self._teacher_V = np.zeros(vocab_size)

    def add(self, signal: SparseSignal, teacher_CV: Floats) -> None:
        """Take in some positions."""
        self._signal_V += np.bincount(
            signal.ids_N, np.exp(signal.logprobs_N.astype(np.float64)), len(self._signal_V)
        )
        self._teacher_V += teacher_CV.sum(0)
        values = {
            "variance": measures.squared_error(signal, teacher_CV),
            "relative": measures.relative_error(signal, teacher_CV),
            "expected_relative": measures.expected_relative_error(signal, teacher_CV),
            "one_round": 1 - np.square(teacher_CV).sum(1),
            "one_round_relative": (teacher_CV > 0).sum(1) - 1.0,
        }
        for name, value in values.items():
            self._values[name].append(value)

    def summary(self) -> dict[str, Any]:
        """Bias of the gradient s - q for any student s, and how noisy q is.

        * ``gradient_bias``: norm of the mean of q - t; ``gradient_bias_by_chance`` is its root mean
          square if there is no bias, from the squared errors of the same positions
        * ``gradient_angle_degrees``: between the means of s - q and of s - t, s uniform over all V
        * ``variance``: Σ Var(qᵢ), with its standard error; ``equivalent_rounds`` is the number of
          multinomial rounds that have as much
        * ``relative_variance``: Σ Var(qᵢ) / tᵢ as it was drawn, with its standard error;
          ``relative_variance_expected`` its mean over draws, which has the
          ``relative_equivalent_rounds``
        """
        values = {name: np.concatenate(parts) for name, parts in self._values.items()}
        mean = {name: float(value.mean()) for name, value in values.items()}
        count = len(values["variance"])
        signal_V, teacher_V = self._signal_V / count, self._teacher_V / count
        uniform = 1 / len(teacher_V)
        return {
            "gradient_bias": float(np.linalg.norm(signal_V - teacher_V)),
            "gradient_bias_by_chance": float(np.sqrt(mean["variance"] / count)),
            "gradient_angle_degrees": measures.angle_degrees(
                uniform - signal_V, uniform - teacher_V
            ),
            "variance": mean["variance"],
            "variance_error": _standard_error(values["variance"]),
            "equivalent_rounds": _ratio(mean["one_round"], mean["variance"]),
            "relative_variance": mean["relative"],
            "relative_variance_error": _standard_error(values["relative"]),
            "relative_variance_expected": mean["expected_relative"],
            "relative_equivalent_rounds": _ratio(
                mean["one_round_relative"], mean["expected_relative"]
            ),
        }


def _probabilities(signal: SparseSignal, vocab_size: int, *, temperature: float) -> Floats:
    logits_CV = np.full((len(signal), vocab_size), -np.inf)
    logits_CV[signal.rows_N, signal.ids_N] = signal.logprobs_N.astype(np.float64) / temperature
    p_CV = np.exp(logits_CV - logits_CV.max(1, keepdims=True))
    return np.asarray(p_CV / p_CV.sum(1, keepdims=True))


def _ratio(value: float, by: float) -> float | None:
    return value / by if by else None


def _spread(values: Floats) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "p99": float(np.quantile(values, 0.99)),
        "max": float(values.max()),
    }


def _standard_error(values: Floats) -> float:
    return float(values.std() / np.sqrt(max(len(values) - 1, 1)))


def _no_audit(store: Store, got: str) -> UsageError:
    return UsageError(
        "the store has nothing to measure its fidelity by",
        where=store.folder.url,
        expected="positions with the teacher's full distribution",
        got=got,
        todo="dump into a new folder with --audit-fraction 0.01, or more if the store is small",
    )
