"""Options of a selection's text, for codecs: they must not import torch to read one number."""

from __future__ import annotations

from kdstore.errors import HeaderError


def option(spec: str, name: str, *, low: float, high: float) -> float:
    """The number that a selection such as ``counts:n=50`` gives to an option.

    Raises HeaderError if it is missing or outside ``low`` to ``high``.

    >>> option("counts:n=50", "n", low=1, high=1000)
    50.0
    """
    for part in spec.partition(":")[2].split(","):
        key, _, text = part.partition("=")
        if key == name:
            value = _number(text)
            if low <= value <= high:
                return value
    raise HeaderError(
        f"selection {spec!r} lacks a usable {name!r}", expected=f"{low} to {high}", got=spec
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
