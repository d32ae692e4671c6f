"""The decorator of compiled kernels: loops over positions that numpy would make passes of.

Kernels release the GIL, never raise, and never index outside their arrays: they check what they
read and answer with a status that the caller turns into an error. They are compiled on first use
and cached beside the file, or in the user's cache where the package is read-only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

# An index: numba takes a signed one for one that may count from the end, which is slower. What is
# not sure to be within an array must be checked before, and a negative one is far outside.
u = np.uint64
# An integer: int() of an unsigned number stays unsigned, and mixed with a signed one makes a float.
i64 = cast("Callable[[Any], int]", np.int64)
F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """The function, compiled by numba."""
    return _compiled(function)


def inlined(function: F) -> F:
    """A part of kernels, compiled into each: passing it arrays would cost more than its work."""
    return _compiled(function, inline="always")


def _compiled(function: F, **options: Any) -> F:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # nowhere to cache: a read-only installation without a home
        return cast(F, numba.njit(**options)(function))
