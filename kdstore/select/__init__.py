"""Selections: full logits in, sparse signals out.

``parse_selection("pps:tau=0.06")`` gives the rule, ``select(logits, …)`` applies it. To add one:
one file with a ``Selection`` subclass, one line in ``registry.py``, one codec, one test file.
"""

from kdstore.select.audit import select_with_audit
from kdstore.select.base import Selection, SelectionStats
from kdstore.select.driver import DEFAULT_SCALARS, select
from kdstore.select.registry import DEFAULT_SELECTION, parse_selection

__all__ = [
    "DEFAULT_SCALARS",
    "DEFAULT_SELECTION",
    "Selection",
    "SelectionStats",
    "parse_selection",
    "select",
    "select_with_audit",
]
