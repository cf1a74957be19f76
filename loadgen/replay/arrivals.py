"""Arrival patterns: the submission times of tasks.

An arrival pattern maps a number of tasks and a random generator to submission times in seconds from the start of
the run. All patterns are open loop: a time does not depend on the progress of earlier tasks. MLPerf's closed-loop
scenarios (SingleStream, MultiStream) are marked by `closed` in a `Schedule`, which overrides the times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path

import numpy as np

from bus.errors import ConfigError

Arrivals = Callable[[int, np.random.Generator], list[float]]
"""(number of tasks, generator) -> submission times in seconds, in ascending order."""


class LoadgenScenario(StrEnum):
    """MLPerf Inference's LoadGen scenarios; they determine when queries are issued."""

    SINGLE_STREAM = "SingleStream"  # one sample per query; the next query follows the previous result
    MULTI_STREAM = "MultiStream"  # eight samples per query; the next query follows the previous results
    SERVER = "Server"  # one sample per query, Poisson arrivals at the target rate
    OFFLINE = "Offline"  # all samples at the start

    @property
    def closed(self) -> bool:
        """Whether each query waits for the previous one to end (closed loop)."""
        return self in (LoadgenScenario.SINGLE_STREAM, LoadgenScenario.MULTI_STREAM)

    @property
    def samples(self) -> int:
        """Default number of samples per query."""
        return 8 if self is LoadgenScenario.MULTI_STREAM else 1


def uniform(within_s: float) -> Arrivals:
    """The paper's pattern (Section V-B): times drawn uniformly from [0, `within_s`), sorted."""
    _positive("the interval", within_s)
    return lambda tasks, rng: sorted(float(instant) for instant in rng.uniform(0.0, within_s, tasks))


def constant(rate_per_s: float) -> Arrivals:
    """One task every 1 / rate seconds, starting at 0."""
    _positive("the request rate", rate_per_s)
    return lambda tasks, rng: [index / rate_per_s for index in range(tasks)]


def poisson(rate_per_s: float) -> Arrivals:
    """Exponential gaps with mean 1 / rate; the first task arrives after one gap."""
    _positive("the request rate", rate_per_s)
    return lambda tasks, rng: [float(instant) for instant in np.cumsum(rng.exponential(1.0 / rate_per_s, tasks))]


def bursts(size: int, every_s: float) -> Arrivals:
    """Bursts of `size` simultaneous tasks every `every_s` seconds, starting at 0."""
    if size < 1:
        raise ConfigError(f"the burst size must be at least 1, not {size}")
    _positive("the time between bursts", every_s)
    return lambda tasks, rng: [index // size * every_s for index in range(tasks)]


def at_once() -> Arrivals:
    """All tasks at time 0 (MLPerf's Offline scenario)."""
    return lambda tasks, rng: [0.0] * tasks


def intervals(gaps_s: Iterable[float]) -> Arrivals:
    """Recorded gaps: the first task arrives after the first gap; the list repeats when it is exhausted.

    Raises `ConfigError` for an empty list, or a gap that is negative or not finite.
    """
    gaps = [float(gap) for gap in gaps_s]
    if not gaps:
        raise ConfigError("the list of request intervals is empty")
    for index, gap in enumerate(gaps):
        if not (gap >= 0 and math.isfinite(gap)):
            raise ConfigError(f"request interval {index} is {gap}; it must be a finite number of seconds, at least 0")
    return lambda tasks, rng: np.cumsum([gaps[index % len(gaps)] for index in range(tasks)]).tolist()


def read_intervals(path: Path) -> list[float]:
    """Read gaps in seconds from a file: one number per line (`#` begins a comment), or one JSON list.

    Raises `ConfigError` naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if text.lstrip().startswith("["):
        try:
            return [float(gap) for gap in json.loads(text)]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: not a JSON list of numbers: {error}") from None
    gaps = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#", 1)[0].strip()
        if not content:
            continue
        try:
            gaps.append(float(content))
        except ValueError:
            raise ConfigError(f"{path}:{number}: {content!r} is not a number of seconds") from None
    return gaps


def _positive(what: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{what} must be greater than 0, not {value}")
