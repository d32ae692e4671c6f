"""The errors of kdstore: one family, one message shape.

A message says what happened, where, what was expected, what was found and what to do next. Every
class also derives from the builtin that fits, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

from typing import Any


class KDStoreError(Exception):
    """Base of every error that kdstore raises on purpose."""

    def __init__(
        self,
        what: str,
        *,
        where: Any = None,
        expected: Any = None,
        got: Any = None,
        todo: str | None = None,
    ) -> None:
        parts = (("where", where), ("expected", expected), ("got", got), ("to do", todo))
        lines = [what, *(f"  {name}: {value}" for name, value in parts if value is not None)]
        super().__init__("\n".join(lines))


class UsageError(KDStoreError, ValueError):
    """An argument, option or combination of them that cannot work."""


class InputError(KDStoreError, ValueError):
    """A training text, row or file that cannot be read or has no usable fields."""


class TeacherError(KDStoreError, ValueError):
    """A teacher that cannot be loaded or gives what cannot be stored."""


class StoppedError(KDStoreError, RuntimeError):
    """Work that was asked to stop, and did where it can go on."""


class TrainingError(KDStoreError, ArithmeticError):
    """A training run whose result is of no use."""


class SignalError(KDStoreError, ValueError):
    """A signal whose arrays contradict each other or the store it goes to."""


class HeaderError(KDStoreError, ValueError):
    """A store whose header is damaged, unknown or of a future version."""


class StoreMismatchError(KDStoreError, ValueError):
    """A dump into a store that was made with another configuration."""


class StoreNotFoundError(KDStoreError, FileNotFoundError):
    """No store where one was expected."""


class CorruptShardError(KDStoreError, ValueError):
    """A shard whose bytes are not the bytes that were committed."""


class StorageError(KDStoreError, OSError):
    """The file system refused to read or write (disk full, no permission, no network)."""


class MissingDependencyError(KDStoreError, ImportError):
    """An optional package is needed; the message carries the install line."""
