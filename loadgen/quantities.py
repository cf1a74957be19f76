"""Quantities as people type them: `2s`, `250ms`, `100Mbps`, `600KB`, and ranges of them, `20Mbps:300Mbps`."""

from __future__ import annotations

import math
import re

from bus.errors import ConfigError

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]*)\s*$")

_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "m": 60.0, "h": 3600.0}
_BPS = {"": 1.0, "bps": 1.0, "kbps": 1e3, "mbps": 1e6, "gbps": 1e9}
_BPS |= {"bit/s": 1.0, "kbit/s": 1e3, "mbit/s": 1e6, "gbit/s": 1e9, "k": 1e3, "m": 1e6, "g": 1e9}
_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1024.0, "mib": 1024.0**2, "gib": 1024.0**3}


def seconds(text: str | float) -> float:
    """Seconds from `2`, `2s`, `250ms`, `1.5min`, `1h`. Raises `ConfigError`."""
    return _parse(text, _SECONDS, "a span of time", "2s, 250ms, 5min")


def bits_per_second(text: str | float) -> int:
    """Bits per second from `100Mbps`, `1.5 Gbit/s`, `2e7`. Raises `ConfigError`."""
    return round(_parse(text, _BPS, "a bandwidth", "100Mbps, 1.5Gbps"))


def size_bytes(text: str | float) -> int:
    """Bytes from `600KB` (1,000 each), `4KiB` (1,024 each), `100`. Raises `ConfigError`."""
    return round(_parse(text, _BYTES, "a size", "600KB, 4KiB"))


def _parse(text: str | float, units: dict[str, float], what: str, examples: str) -> float:
    if isinstance(text, int | float) and not isinstance(text, bool):
        value = float(text)
    else:
        match = _NUMBER.match(text) if isinstance(text, str) else None
        factor = units.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise ConfigError(f"{text!r} is not {what} (such as {examples})")
        value = float(match[1]) * factor
    if not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"{text!r} is not {what} (such as {examples})")
    return value
