"""Kernels compile wherever the package is installed."""

from __future__ import annotations

from typing import Any

from kdstore.codecs.jit import inlined, kernel


def test_a_kernel_without_a_place_for_its_cache() -> None:
    names: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", names)  # of no file, beside which a cache could lie
    assert kernel(names["double"])(21) == 42


def test_an_inlined_function_is_part_of_its_kernel() -> None:
    @inlined
    def half(x: int) -> int:
        return x >> 1

    @kernel
    def quarter(x: int) -> int:
        return half(half(x))

    assert quarter(42) == 10
