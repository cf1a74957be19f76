"""Traces: how the bandwidth, and optionally the latency, of a link change over time, read from a CSV file.

    t_s,bps,latency_s
    0,13388000,0.02
    1.5,0,0.02
    4,18645000,0.03
    10,18645000,0.03

A row holds from its `t_s` until that of the next row. The last row marks the end, where the trace begins again.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from bus.errors import ConfigError

HEADERS = (("t_s", "bps"), ("t_s", "bps", "latency_s"))
MAX_ROWS = 1_000_000
MAX_BPS = float(1 << 50)
"""As for every rate in a message (`bus.values.BitsPerSecond`)."""
MAX_LATENCY_S = 3600.0
"""Rejects latencies that were written in milliseconds."""


class Row(NamedTuple):
    """The state of the link for a while."""

    bps: float
    latency_s: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    """The rows of a trace; it repeats."""

    name: str  # for messages to people
    begin_s: tuple[float, ...]  # when each row begins, from 0
    rows: tuple[Row, ...]
    has_latency: bool  # whether the file has the column

    @property
    def period_s(self) -> float:
        """The length of the trace."""
        return self.begin_s[-1] + self.rows[-1].duration_s

    @property
    def mean_latency_s(self) -> float:
        """The mean over time."""
        return math.fsum(row.latency_s * row.duration_s for row in self.rows) / self.period_s

    def latency_s(self, elapsed_s: float) -> float:
        """The latency after this time since the trace began."""
        return self.rows[max(0, bisect_right(self.begin_s, elapsed_s % self.period_s) - 1)].latency_s


def is_trace_file(text: str) -> bool:
    """Whether the value of a latency names the file of a trace instead."""
    return text.lower().endswith(".csv")


def read_trace(path: Path) -> Trace:
    """Read and check a file. Raises `ConfigError` naming the file and the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"trace {path}: not text in UTF-8", remedy=_EXAMPLE) from None
    return parse_trace(str(path), text.splitlines())


_EXAMPLE = "the first line is t_s,bps,latency_s or t_s,bps; each further line is a row like 1.5,20000000,0.02"


def parse_trace(name: str, lines: Iterable[str]) -> Trace:
    """The trace in these lines. Raises `ConfigError` naming the line."""

    numbered = ((number, line.strip()) for number, line in enumerate(lines, 1))
    found = ((number, line) for number, line in numbered if line and not line.startswith("#"))
    first = next(found, None)
    if first is None:
        raise ConfigError(f"trace {name}: empty", remedy=_EXAMPLE)
    columns = tuple(word.strip() for word in first[1].split(","))
    if columns not in HEADERS:
        raise ConfigError(f"trace {name}, line {first[0]}: the header is {first[1]!r}", remedy=_EXAMPLE)
    table: list[tuple[float, ...]] = []
    for number, line in found:
        try:
            values = _values(columns, line)
            _check_order(values[0], table)
        except ValueError as error:
            raise ConfigError(f"trace {name}, line {number}: {error}") from None
        table.append(values)
    if len(table) < 2:
        raise ConfigError(f"trace {name}: fewer than two rows; the last one marks the end", remedy=_EXAMPLE)
    rows = tuple(
        Row(row[1], row[2] if len(row) > 2 else 0.0, following[0] - row[0]) for row, following in pairwise(table)
    )
    if not any(row.bps for row in rows):
        raise ConfigError(f"trace {name}: the link never carries anything; a row before the last needs bps above 0")
    return Trace(name, tuple(row[0] for row in table[:-1]), rows, len(columns) > 2)


_LIMITS = {"t_s": 1e9, "bps": MAX_BPS, "latency_s": MAX_LATENCY_S}


def _values(columns: tuple[str, ...], line: str) -> tuple[float, ...]:
    """The values of a row. Raises ValueError."""
    words = [word.strip() for word in line.split(",")]
    if len(words) != len(columns):
        raise ValueError(f"{len(words)} values; the header has {len(columns)} columns")
    values = []
    for column, word in zip(columns, words, strict=True):
        try:
            value = float(word)
        except ValueError:
            raise ValueError(f"{column}: {word!r} is not a number") from None
        if not 0 <= value <= _LIMITS[column]:
            raise ValueError(f"{column}: {word} is not between 0 and {_LIMITS[column]:g}")
        values.append(value)
    return tuple(values)


def _check_order(begin_s: float, before: list[tuple[float, ...]]) -> None:
    """Raises ValueError unless a row may follow those before it."""
    if not before and begin_s != 0:
        raise ValueError(f"t_s: the first row begins at {begin_s:g}, not at 0")
    if before and begin_s <= before[-1][0]:
        raise ValueError(f"t_s: {begin_s:g} does not come after {before[-1][0]:g}")
    if len(before) > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS:,} rows")
