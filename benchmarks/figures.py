"""How benchmarks print: one JSON object a line, ``{"figure", "value", "unit", …}``."""

from __future__ import annotations

import json
import os
import platform
from typing import Any


def print_figure(figure: str, value: float, unit: str, **more: Any) -> None:
    """Print one figure; ``more`` says how it came about."""
    print(json.dumps({"figure": figure, "value": value, "unit": unit, **more}), flush=True)


def machine() -> str:
    """The machine's architecture and core count, for the record of a figure."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def print_failure(figure: str, error: str, **more: Any) -> None:
    """Print that a figure could not be measured, and why."""
    print(json.dumps({"figure": figure, "error": error, **more}), flush=True)
