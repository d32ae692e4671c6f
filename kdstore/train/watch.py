"""What a run shows while it trains, and what it counts: tokens and time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from kdstore.progress import Progress


class TokenMeter:
    """Tokens that this process has trained a model on, without what attention masks leave out."""

    def __init__(self, model: nn.Module) -> None:
        self._tokens: Any = 0
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training and "input_ids" in kwargs:
            mask = kwargs.get("attention_mask")
            # On the model's device: asking for the number here would wait for every step.
            self._tokens = self._tokens + (
                kwargs["input_ids"].numel() if mask is None else mask.sum()
            )

    @property
    def tokens(self) -> int:
        """The count; waits for the device."""
        return int(self._tokens)


class TrainingWatch(TrainerCallback):  # type: ignore[misc]
    """Draws a run's progress: steps, losses, tokens per second of all processes, time left.

    Afterwards, ``tokens`` and ``seconds`` are those of this session: without what a run that it
    goes on from has done.
    """

    def __init__(self, meter: TokenMeter, *, shown: Iterable[str], quiet: bool) -> None:
        self.seconds = 0.0
        self._meter, self._quiet = meter, quiet
        self._shown = ("loss", *shown, "eval_loss", "eval_perplexity")
        self._ranks = 1
        self._progress: Progress | None = None

    @property
    def tokens(self) -> int:
        """Tokens trained on: this process's, times the number of processes."""
        return self._meter.tokens * self._ranks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count and to draw."""
        self._ranks = args.world_size
        self._began_s = self._logged_s = time.monotonic()
        self._logged_tokens = 0
        self._progress = Progress(
            "train",
            total=state.max_steps,
            unit="steps",
            done=state.global_step,
            quiet=self._quiet or not state.is_world_process_zero,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        if self._progress is not None:
            self._progress.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the losses of training or of an evaluation."""
        logs = kwargs["logs"]
        figures = [f"{name} {value:.4g}" for name, value in logs.items() if name in self._shown]
        if self._progress is None or not figures:
            return
        if "loss" in logs:
            figures.append(f"{self._rate():,.0f} tokens/s")
        self._progress.note("  ".join(figures))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time, and leave the bar."""
        self.seconds = time.monotonic() - self._began_s
        if self._progress is not None:
            self._progress.close()
        self._progress = None  # what is evaluated at the end stands in the summary

    def _rate(self) -> float:
        """Tokens per second since the last log."""
        tokens, now_s = self.tokens, time.monotonic()
        rate = (tokens - self._logged_tokens) / max(now_s - self._logged_s, 1e-9)
        self._logged_tokens, self._logged_s = tokens, now_s
        return rate
