"""Rates, durations and counts as people write and read them: `100Mbps`, `1.5 Gbit/s`, `200 ms`, `1 task`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bus.errors import ConfigError

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_RATE = re.compile(r"([0-9]*\.?[0-9]+)\s*([kmg]?)(?:bps|bit/s|bits/s)?", re.IGNORECASE)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_RATE_UNITS = ((1e9, 1e9, "Gbps"), (1e6, 1e6, "Mbps"), (1e3, 1e3, "kbps"), (0.0, 1.0, "bps"))
_TIME_UNITS = (
    (7200.0, 3600.0, "h"),
    (120.0, 60.0, "min"),
    (1.0, 1.0, "s"),
    (1e-3, 1e-3, "ms"),
    (0.0, 1e-6, "us"),
)
"""From which value on a unit is used, and its size: largest first."""

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
    return _format(bps, _RATE_UNITS) if bps else "0 bps"


def format_seconds(seconds: float) -> str:
    """`43 ms`, `1.25 s`, `3 h`: three digits and a unit."""
    return _format(seconds, _TIME_UNITS) if seconds else "0 s"


def format_moment(seconds: float, decimals: int = 2) -> str:
    """`1665.20 s`: a point on a clock, to a fixed number of decimals."""
    return f"{seconds:.{decimals}f} s"


def _format(value: float, units: Sequence[tuple[float, float, str]]) -> str:
    if value < 0:
        return f"-{_format(-value, units)}"
    rounded = float(f"{value:.3g}")  # the unit is chosen after rounding: 999.96 ms is 1 s, not 1000 ms
    scale, unit = next((scale, unit) for least, scale, unit in units if rounded >= least)
    return f"{_three_digits(value / scale)} {unit}"


def _three_digits(value: float) -> str:
    """At most three significant digits, never an exponent."""
    if value < 0.001:
        return "<0.001"
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e" in text else text


def format_count(count: int, noun: str, plural: str | None = None) -> str:
    """`1 task`, `2,000 tasks`; `plural` where an s does not make it."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
