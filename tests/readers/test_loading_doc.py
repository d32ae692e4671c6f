"""The Python of docs/loading.md runs as written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOC = Path(__file__).parents[2] / "docs" / "loading.md"


@pytest.mark.filterwarnings("ignore:.*use of fork.*may lead to deadlocks:DeprecationWarning")
def test_every_block_runs_in_order(dump: Callable[..., Path]) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block.replace("STORE", str(dump())), str(DOC), "exec"), names)
    assert len(blocks) == 6
    assert len(json.dumps(names["checkpoint"])) < 1000
    assert names["checkpoint"]["loader"]["epoch"] == 2
    assert names["state"]["epoch"] == 1
    assert len(names["other"].signal) > 0
