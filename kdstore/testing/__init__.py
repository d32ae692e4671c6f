"""Helpers for the tests of those who use kdstore."""

from __future__ import annotations

from kdstore.testing.resumable import assert_resumable

__all__ = ["assert_resumable"]
