"""The teacher's side of a divergence: log-probabilities at a temperature, inside and outside.

At temperature T an entry is logp / T - log Σ p^(1/T), where the sum runs over the whole vocabulary.
Dumps record it as the scalar ``lse_T<T>`` when asked to (Hinton et al. 2015, arXiv:1503.02531, for
the use of T). Without it the mass that the entries do not carry is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kdstore.errors import SignalError, UsageError
from kdstore.select.registry import parse_selection
from kdstore.select.scalars import LSE_T_PREFIX
from kdstore.train.losses.base import (
    is_sampled,
    refuse_without_entries,
    segment_logsumexp,
    segment_sum,
)

if TYPE_CHECKING:
    from kdstore.signal import TorchSignal

Outside = Literal["rest", "renormalize", "truncate"]


@dataclass(frozen=True)
class Teacher:
    """Log-probabilities of the entries [N], and of all that is no entry [S] or None."""

    log_t_N: Tensor
    log_rest_S: Tensor | None


def refuse_sampled(signal: TorchSignal, *, loss: str, allowed: bool) -> None:
    """UsageError for a drawn signal in a loss that is not linear in the teacher."""
    if is_sampled(signal.selection) and not allowed:
        raise UsageError(
            f"{loss} of a drawn target is biased: it is not linear in the teacher",
            where=f"signal {signal.selection}",
            expected="a topk, topp or full signal",
            got=signal.selection,
            todo="use forward_kl, or dump with --select topk:k=50; allow_sampled takes the draw "
            "for the teacher",
        )


def refuse_temperature(signal: TorchSignal, *, temperature: float, outside: Outside) -> None:
    """UsageError or SignalError unless the signal can be compared at a temperature."""
    refuse_without_entries(signal.selection)
    if is_sampled(signal.selection):
        _refuse_other_draw(signal.selection, temperature)
    elif temperature != 1 and outside != "renormalize" and signal.selection != "full":
        lse_at(signal, temperature)


def _refuse_other_draw(selection: str, temperature: float) -> None:
    drawn = getattr(parse_selection(selection), "temperature", 1.0)
    if drawn != temperature:
        raise UsageError(
            "the signal was drawn at another temperature than the loss compares at",
            where=f"signal {selection}",
            expected=f"temperature={drawn:g}",
            got=f"temperature={temperature:g}",
            todo="set the loss's temperature to that of the draw, or dump at another",
        )


def lse_at(signal: TorchSignal, temperature: float) -> Tensor:
    """float32 [S]: log Σ p^(1/T); SignalError if the store does not have it."""
    for name, values_S in signal.scalars.items():
        text = name.removeprefix(LSE_T_PREFIX)
        if text != name and float(text) == temperature:
            return values_S
    raise SignalError(
        f"the teacher's mass outside the entries is unknown at temperature {temperature:g}",
        where=f"signal {signal.selection}",
        expected=f"the scalar {LSE_T_PREFIX}{temperature:g}",
        got=", ".join(signal.scalars) or "no scalars",
        todo=f"dump with --temperatures {temperature:g}, or use outside='renormalize'",
    )


def teacher_at(
    signal: TorchSignal, *, temperature: float, outside: Outside, dtype: torch.dtype
) -> Teacher:
    """The teacher's log-probabilities, of a signal that ``refuse_temperature`` let pass."""
    log_t_N, log_rest_S = signal.logprobs_N.to(dtype), signal.rest_S.to(dtype)
    tempered = temperature != 1 and not is_sampled(signal.selection)
    if tempered:
        log_t_N = log_t_N / temperature
    if outside == "renormalize" or (tempered and signal.selection == "full"):
        log_t_N = log_t_N - _entries_lse(log_t_N, signal)[signal.rows_N]
    elif tempered:
        log_t_N = log_t_N - lse_at(signal, temperature).to(dtype)[signal.rows_N]
        log_rest_S = _log_rest(log_t_N, signal)
    return Teacher(log_t_N, log_rest_S if outside == "rest" else None)


def _entries_lse(log_t_N: Tensor, signal: TorchSignal) -> Tensor:
    return segment_logsumexp(log_t_N, signal.rows_N, rows=len(signal))


def _log_rest(log_t_N: Tensor, signal: TorchSignal) -> Tensor:
    """[S]: log(1 - Σ t), in float64 where there is one: float32 would lose what is below 1e-7.

    Where nothing was outside the entries, nothing is at any temperature.
    """
    wide = log_t_N if log_t_N.device.type == "mps" else log_t_N.double()
    kept_S = segment_sum(wide.exp(), signal.rows_N, rows=len(signal))
    left_S = (1 - kept_S).clamp(min=0).masked_fill(signal.rest_S == -torch.inf, 0.0)
    return left_S.log().to(log_t_N.dtype)
