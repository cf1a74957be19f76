"""What a message or a setting that does not validate says, in one line."""

from __future__ import annotations

from pydantic import ValidationError


def first_fault(error: ValidationError, *within: str) -> str:
    """`where: what is wrong` of the first fault, `within` in front of its place; only what is wrong where it has no place."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in (*within, *first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch":
        message = "holds a character that a name may not have: letters and digits, then also _ and -, no blanks"
    return f"{where}: {message}" if where else message
