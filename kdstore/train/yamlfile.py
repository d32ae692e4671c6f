"""YAML in and out: a mapping from a file, ``key=value`` changes to it, and back to text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kdstore.errors import UsageError

_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"))


class _Loader(yaml.SafeLoader):
    """Safe YAML whose floats may lack a dot: YAML 1.1 reads 1e-3 as text."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart, which quotes a text such as 1e-3."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(*_FLOAT, list("-+0123456789"))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UsageError if it cannot be read or is something else."""
    try:
        data = _parse(path.read_text(encoding="utf-8"), where=str(path))
    except OSError as error:
        raise UsageError("cannot read the configuration", where=path, got=error.strerror) from error
    if not isinstance(data, dict):
        raise UsageError(
            "a configuration is a mapping",
            where=path,
            expected="keys such as store, student, losses, training",
            got=type(data).__name__,
        )
    return data


def override(data: dict[str, Any], text: str) -> None:
    """Set a dotted key in the nested mappings of ``data``, making those that are missing."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(
            "not an override",
            where="command line",
            expected="key=value or outer.inner=value",
            got=text,
            todo="write it without spaces around =, or in quotes",
        )
    *outer, last = key.split(".")
    for name in outer:
        if data.get(name) is None:
            data[name] = {}
        data = data[name]
        if not isinstance(data, dict):
            raise UsageError(f"{name!r} has no keys inside", where=text, got=data)
    data[last] = _parse(value, where=text)


def to_yaml(data: dict[str, Any]) -> str:
    """Text from which ``read_mapping`` gives the same, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError("not valid YAML", where=where, got=str(error)) from error
