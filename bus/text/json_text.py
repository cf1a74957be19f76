"""JSON output without NaN and Infinity, which RFC 8259 does not allow.

A number that is not finite becomes `null`. If the value is an object, its key `not_finite` then lists the replaced numbers:
`{"delay_s": null, "not_finite": {"delay_s": "infinity"}}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def json_text(value: Any, *, indent: int | None = None, compact: bool = False) -> str:
    """`value` as JSON text; `compact` omits the spaces. Raises `TypeError` for values that JSON cannot represent."""
    separators = (",", ":") if compact else None
    try:
        return json.dumps(value, indent=indent, separators=separators, allow_nan=False)
    except ValueError:
        found: dict[str, str] = {}
        plain = _finite(value, "", found)
        if isinstance(plain, dict):
            plain["not_finite"] = found
        return json.dumps(plain, indent=indent, separators=separators, allow_nan=False)


def _finite(value: Any, path: str, found: dict[str, str]) -> Any:
    """A copy with None for every number that is not finite; adds their paths and values to `found`."""
    if isinstance(value, float) and not math.isfinite(value):
        found[path] = "not a number" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
        return None
    step = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{step}{key}", found) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item, f"{step}{at}", found) for at, item in enumerate(value)]
    return value
