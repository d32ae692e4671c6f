"""A shallower copy of a decoder: some of its layers, with all else as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kdstore.errors import UsageError

_TODO = "take another teacher, or save the student yourself and set student.path"


def pick_layers(layers: int | Sequence[int], total: int) -> list[int]:
    """Numbers of the layers to keep, of ``total``; a number of them is spread evenly.

    The first and the last are kept and the others lie as far apart as they can, rounded up at
    halves: 3 of 12 are 0, 6, 11. So copies of teachers are made in "Pre-trained Summarization
    Distillation" (Shleifer and Rush, 2020), after DistilBERT's every second layer; 1 is the first.
    Raises UsageError for more layers than there are, or a list that is not in their order.
    """
    if isinstance(layers, int):
        expected, good = f"1 to {total}", 1 <= layers <= total
        gaps = max(layers - 1, 1)
        kept = [(2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(max(layers, 0))]
    else:
        kept = list(layers)
        expected = f"increasing numbers from 0 to {total - 1}, such as [0, {total - 1}]"
        good = bool(kept) and kept == sorted({*kept} & {*range(total)})
    if not good:
        raise UsageError(
            "these layers cannot be kept", where="student.layers", expected=expected, got=layers
        )
    return kept


def prune_layers(model: Any, layers: int | Sequence[int]) -> nn.Module:
    """A new model with some layers of ``model``; its weights and those around them are the same.

    It is made from its configuration, as it will be when it is loaded: so each layer's number is
    its new one, by which caches are addressed. What a configuration lists layer by layer
    (``layer_types``) is cut alike. Raises UsageError for layers that there are not, and for an
    architecture whose layers cannot be told or depend on their number otherwise.
    """
    name = _layer_list(model)
    total = model.config.get_text_config().num_hidden_layers
    kept = pick_layers(layers, total)
    try:
        pruned = type(model)._from_config(_shorter(model.config, kept), dtype=model.dtype)
        pruned.load_state_dict(_renumbered(model.state_dict(), f"{name}.", kept))
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise UsageError(
            "this architecture says what a layer is by its number",
            where=f"student.prune: {type(model).__name__}",
            expected=f"layers {kept} in places 0 to {len(kept) - 1}",
            got=" ".join(str(error).split())[:300],
            todo=f"choose other student.layers, or {_TODO}",
        ) from error
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned  # type: ignore[no-any-return]


def _layer_list(model: Any) -> str:
    """The name of the one list of all layers; lists inside of it, such as experts, do not count."""
    total = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == total and not inside:
            found.append(name)
    if len(found) != 1:
        raise UsageError(
            "the layers of this architecture cannot be told",
            where=f"student.prune: {type(model).__name__}",
            expected=f"one list of num_hidden_layers = {total} modules",
            got=", ".join(found) or "none",
            todo=_TODO,
        )
    return found[0]


def _shorter(config: Any, kept: Sequence[int]) -> Any:
    """The configuration with the kept layers, in every list that has one item for each."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    for name, value in vars(text).items():
        # Token ids are listed too, and may happen to be as many.
        if isinstance(value, list) and len(value) == text.num_hidden_layers and "token" not in name:
            setattr(text, name, [value[number] for number in kept])
    text.num_hidden_layers = len(kept)
    return shorter


def _renumbered(
    state: dict[str, torch.Tensor], prefix: str, kept: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Weights of the kept layers under their new numbers, and all that are not of a layer."""
    places = {str(number): place for place, number in enumerate(kept)}
    found = {}
    for name, value in state.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            found[name] = value
        elif number in places:
            found[f"{prefix}{places[number]}.{rest}"] = value
    return found
