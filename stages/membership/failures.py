"""How a node names an error in `TaskFailed`: a stable cause, and a text for users."""

from __future__ import annotations

from bus.errors import DeeparError, ProtocolError


def detail_of(error: Exception) -> str:
    """Text of an error for `TaskFailed`; includes the type of errors from outside DeePar."""
    return str(error) if isinstance(error, DeeparError) else f"{type(error).__name__}: {error}"


def cause_of(error: Exception) -> str:
    """Short, stable cause of an error for `TaskFailed`."""
    if isinstance(error, ProtocolError):
        return error.cause
    if not isinstance(error, DeeparError):
        return "stage_error"
    name = type(error).__name__.removesuffix("Error")
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
