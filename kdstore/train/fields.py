"""Dataclasses from nested mappings: unknown keys get the nearest name, wrong types are named."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kdstore.errors import UsageError

T = TypeVar("T")
_PLAIN = (bool, int, float, str, list, dict, type(None))


def build(cls: type[T], data: Mapping[str, Any], *, where: str = "") -> T:
    """An instance of the dataclass ``cls`` from a mapping, nested dataclasses included.

    Raises UsageError for a key it does not have, a value of the wrong type or a missing one.
    """
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    refuse_unknown(data, fields, where=where)
    for name, item in fields.items():
        if name not in data and _is_required(item):
            raise UsageError(
                "missing key",
                where=where or "configuration",
                expected=name,
                got=", ".join(map(str, data)) or "no keys",
                todo=f"add {_join(where, name)}",
            )
    values = {name: _value(_join(where, name), value, hints[name]) for name, value in data.items()}
    return cls(**values)


def refuse_unknown(given: Iterable[str], valid: Iterable[str], *, where: str) -> None:
    """Raise UsageError for the first key that is not valid, with the nearest one that is."""
    names = sorted(valid)
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise UsageError(
                f"unknown key {_join(where, str(key))!r}",
                expected=None if near else ", ".join(names),
                todo=f"did you mean {_join(where, near[0])!r}?" if near else None,
            )


def refuse_reserved(given: Mapping[str, Any], reserved: Mapping[str, str], *, where: str) -> None:
    """Raise UsageError for a key that ``reserved`` says where to set instead."""
    for name, todo in reserved.items():
        if name in given:
            raise UsageError(
                f"{_join(where, name)} is not yours to set",
                where=where,
                expected=f"no {name}",
                got=given[name],
                todo=todo,
            )


def check_type(key: str, value: Any, hint: Any) -> None:
    """Raise UsageError naming the key unless the value is of the annotated type."""
    if not _fits(value, hint):
        raise UsageError(
            f"{key} has the wrong type",
            expected=_describe(hint),
            got=f"{value!r} ({type(value).__name__})",
        )


def _value(key: str, value: Any, hint: Any) -> Any:
    hints = (hint, *get_args(hint))
    nested = [item for item in hints if dataclasses.is_dataclass(item)]
    if nested and isinstance(value, Mapping):
        return build(nested[0], value, where=key)  # type: ignore[arg-type]
    lists = [item for item in hints if get_origin(item) is list]
    if isinstance(value, list) and lists and dataclasses.is_dataclass(get_args(lists[0])[0]):
        return [_value(f"{key}[{n}]", item, get_args(lists[0])[0]) for n, item in enumerate(value)]
    check_type(key, value, hint)
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, item) for item in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items()
        )
    return _is_instance(value, hint)


def _is_instance(value: Any, hint: Any) -> bool:
    """isinstance, but True is no number and an int will do for a float."""
    if hint is type(None) or hint is None:
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(item) for item in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(item) for item in get_args(hint))
    if get_origin(hint) is list:
        return f"a list of {_describe(get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        keys = ", ".join(item.name for item in dataclasses.fields(hint))
        return f"a mapping with the keys {keys}"
    if hint is type(None):
        return "null"
    return hint.__name__ if hint in _PLAIN else str(hint).removeprefix("typing.")


def _is_required(item: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return item.default is missing and item.default_factory is missing


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
