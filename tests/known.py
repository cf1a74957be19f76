"""`known`: unwraps an optional value that a test requires to be present."""

from __future__ import annotations

from typing import TypeVar

_Value = TypeVar("_Value")


def known(value: _Value | None) -> _Value:
    """Return the value. Raises `AssertionError` if it is None."""
    assert value is not None
    return value
