"""Which weights are trained: all, those that no pattern freezes, or adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from kdstore.errors import MissingDependencyError, UsageError
from kdstore.train.config import LoraConfig


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave the parameters whose names match a glob pattern as they are.

    Raises UsageError for a pattern that matches none, and if nothing is left to train.
    """
    # Of tied weights, either name counts.
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matching = [parameter for name, parameter in named if fnmatchcase(name, pattern)]
        if not matching:
            raise UsageError(
                "a pattern matches no parameter",
                where=f"freeze: {pattern!r}",
                expected=f"names such as {', '.join(name for name, _ in named[:3])}",
                got="none",
                todo="correct the pattern; * stands for any text, dots included",
            )
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in named):
        raise UsageError(
            "nothing is left to train",
            where="freeze",
            expected="parameters that no pattern matches",
            got=list(patterns),
            todo="leave out a pattern",
        )


def add_adapters(model: Any, config: LoraConfig, *, seed: int) -> nn.Module:
    """``model`` with low-rank adapters of ``seed``, which are all that is trained and saved.

    Raises MissingDependencyError without peft, UsageError for modules that it does not find.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "adapters need peft", where="lora", todo="pip install kdstore[peft]"
        ) from error
    options = asdict(config)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        lora_alpha=options.pop("alpha"),
        lora_dropout=options.pop("dropout"),
        **options,
    )
    torch.manual_seed(seed)
    try:
        return peft.get_peft_model(model, settings)  # type: ignore[no-any-return]
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            "peft refuses these adapters",
            where="lora",
            expected="options and target_modules that suit the student",
            got=str(error),
            todo="set lora.target_modules to all-linear, or to names of the student's own layers",
        ) from error


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters of a model, and those that are trained."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return sum(parameter.numel() for parameter in parameters), trained
