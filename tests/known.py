"""What may be missing in general and must be there in a test."""

from __future__ import annotations

from typing import TypeVar

_Value = TypeVar("_Value")


def known(value: _Value | None) -> _Value:
    """The value. Raises AssertionError where there is none."""
    assert value is not None
    return value
