"""Rates and durations as people write them: `100Mbps`, `1.5 Gbit/s`, `200ms`."""

from __future__ import annotations

import re

from bus.errors import ConfigError

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_RATE = re.compile(r"([0-9]*\.?[0-9]+)\s*([kmg]?)(?:bps|bit/s|bits/s)?", re.IGNORECASE)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", re.IGNORECASE)


def parse_rate(text: str | int | float) -> int:
    """Bits per second. Raises `ConfigError`."""
    match = _RATE.fullmatch(str(text).strip())
    if match is None:
        raise ConfigError(f"{text!r} is no rate", remedy="write it like 100Mbps, 1.5Gbps or 250000")
    return round(float(match[1]) * _SCALE[match[2].lower()])


def parse_duration(text: str | int | float) -> float:
    """Seconds. Raises `ConfigError`."""
    match = _DURATION.fullmatch(str(text).strip())
    if match is None or match[2].lower() not in _SECONDS:
        raise ConfigError(f"{text!r} is no duration", remedy="write it like 200ms, 2s, 5min or 1.5")
    return float(match[1]) * _SECONDS[match[2].lower()]


def format_rate(bps: float) -> str:
    """`117 Mbps`: three digits and a unit."""
    for scale, unit in ((1e9, "Gbps"), (1e6, "Mbps"), (1e3, "kbps")):
        if bps >= scale:
            return f"{bps / scale:.3g} {unit}"
    return f"{bps:.0f} bps"


def format_seconds(seconds: float) -> str:
    """`43 ms`, `1.25 s`: three digits and a unit."""
    if seconds == 0:
        return "0"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min"
