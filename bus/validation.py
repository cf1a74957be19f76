"""Validation errors as one line of text."""

from __future__ import annotations

from pydantic import ValidationError


def first_fault(error: ValidationError, *within: str) -> str:
    """The first error as `location: description`, the location prefixed by `within`; without a location the description."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in (*within, *first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch":
        message = "contains a character that is not allowed in a name; use letters, digits, _ and -"
    return f"{where}: {message}" if where else message
