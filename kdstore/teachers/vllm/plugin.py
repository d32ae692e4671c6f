"""What vLLM loads in each of its processes (entry-point group ``vllm.general_plugins``)."""

from __future__ import annotations

import sys
from typing import Any


def register() -> None:
    """Let workers of vLLM's CPU build start where numba is imported.

    They look at ``vars(value).get`` of all that modules hold. llvmlite's handle of its library
    answers any attribute, ``__dict__`` too, with a function of that name.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    handle: Any = getattr(ffi, "_lib_wrapper", None)
    if handle is None:
        return
    look_up = handle.__getattr__

    def without_dunders(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(self, name)

    handle.__getattr__ = without_dunders
