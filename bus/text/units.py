"""Parsing and formatting of rates, durations, sizes, shares and counts: `100Mbps`, `200 ms`, `25 %`, `1 task`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bus.errors import ConfigError

_QUANTITY = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-z/]*)", re.IGNORECASE)
_SCALES = {"k": 1e3, "m": 1e6, "g": 1e9}
_RATES = _SCALES | {
    f"{scale}{unit}": factor for scale, factor in ({"": 1.0} | _SCALES).items() for unit in ("bps", "bit/s", "bits/s")
}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_RATE_UNITS = ((1e9, 1e9, "Gbps"), (1e6, 1e6, "Mbps"), (1e3, 1e3, "kbps"), (0.0, 1.0, "bps"))
_TIME_UNITS = (
    (7200.0, 3600.0, "h"),
    (120.0, 60.0, "min"),
    (1.0, 1.0, "s"),
    (1e-3, 1e-3, "ms"),
    (0.0, 1e-6, "us"),
)
"""Per unit: the smallest value that is shown in it, its size and its name; largest first."""

_LARGEST = 1e15
"""Upper limit of any quantity in its base unit: rejects typing errors and keeps the arithmetic exact enough."""


def parse_rate(text: str | float, where: str = "") -> int:
    """Bits per second from `100Mbps`, `1.5 Gbit/s`; 0 needs no unit. `where` (a flag, a variable) prefixes errors.

    Raises `ConfigError`.
    """
    return round(_parse(text, where, "rate", _RATES, ("Mbps", "1.5Gbps", "250kbps")))


def parse_duration(text: str | float, where: str = "") -> float:
    """Seconds from `200ms`, `2s`, `5min`; 0 needs no unit. `where` prefixes errors. Raises `ConfigError`."""
    return _parse(text, where, "duration", _SECONDS, ("s", "200ms", "5min"))


def parse_size(text: str | float, where: str = "") -> int:
    """Bytes from `600KB` (1,000 each), `4KiB` (1,024 each), `100B`; 0 needs no unit. `where` prefixes errors.

    Raises `ConfigError`.
    """
    return round(_parse(text, where, "size", _BYTES, ("KB", "4KiB", "1000B")))


def _parse(text: str | float, where: str, what: str, units: Mapping[str, float], like: tuple[str, str, str]) -> float:
    """A number with one of `units`. `like` is used in errors: a default unit and two examples."""
    shown = f"{where} {text}" if where else repr(text)
    unit, *examples = like
    match = _QUANTITY.fullmatch(str(text).strip())
    if match is None or (match[2] and match[2].lower() not in units):
        raise ConfigError(f"{shown}: not a {what}", remedy=f"write it like 100{unit}, {' or '.join(examples)}")
    number = float(match[1])
    if not match[2] and number:
        raise ConfigError(
            f"{shown}: a {what} without a unit",
            remedy=f"write {match[1]}{unit}, or another unit: {' or '.join(examples)}",
        )
    value = number * units[match[2].lower()] if match[2] else 0.0
    if value > _LARGEST:
        raise ConfigError(f"{shown}: more than any {what} can be")
    return value


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


def format_share(share: float) -> str:
    """`25 %`: a share or a relative error, in whole percent."""
    percent = 100.0 * share
    if 0.0 < abs(percent) <= 0.5:
        return f"{'-' if percent < 0 else ''}<1 %"
    return f"{percent:,.0f} %"


def format_count(count: int, noun: str, plural: str | None = None) -> str:
    """`1 task`, `2,000 tasks`; pass `plural` if it is not formed with an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
