"""What importing costs, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kdstore

ROOT = Path(kdstore.__file__).parent
HEAVY = ("torch", "transformers", "vllm", "datasets", "polars", "httpx2")
LAYERS = {
    "select": {"core"},
    "codecs": {"core"},
    "align": {"core"},
    "inputs": {"core"},
    "writers": {"core", "select", "codecs", "align", "inputs", "writers", "readers"},
    "readers": {"core", "select", "codecs", "align", "inputs", "writers", "readers"},
    "generate": {"core", "codecs", "inputs", "writers"},
    "teachers": {"core", "select", "codecs", "align", "inputs", "writers", "readers", "generate"},
}


@pytest.mark.parametrize(
    "module", ["kdstore", "kdstore_cli.main", "kdstore.inputs", "kdstore.codecs"]
)
def test_import_is_light(module: str) -> None:
    code = f"import {module}, sys; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    for name in kdstore.__all__:
        assert getattr(kdstore, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        kdstore.nothing  # noqa: B018


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert version("kdstore") == kdstore.__version__


def test_imports_point_one_way() -> None:
    for layer, allowed in LAYERS.items():
        for file in (ROOT / layer).rglob("*.py"):
            for name in imported_layers(file):
                assert name in allowed | {layer}, f"{file.relative_to(ROOT)} imports kdstore.{name}"


def imported_layers(file: Path) -> set[str]:
    """The parts of kdstore that a file imports: a folder's name, or ``core``."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdstore."):
            names.add((node.module or "").split(".")[1])
    return {name if (ROOT / name).is_dir() else "core" for name in names}
