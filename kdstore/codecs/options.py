"""Options of a selection's text, for codecs: they must not import torch to read one number."""

from __future__ import annotations

from kdstore.errors import HeaderError


def option(spec: str, name: str) -> float:
    """The number that a selection such as ``counts:n=50`` gives to an option.

    >>> option("counts:n=50", "n")
    50.0
    """
    for part in spec.partition(":")[2].split(","):
        key, _, value = part.partition("=")
        if key == name:
            return float(value)
    raise HeaderError(f"selection {spec!r} has no option {name!r}", expected=name, got=spec)
