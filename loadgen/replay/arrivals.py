"""When tasks arrive: the patterns that load generators know, the paper's among them.

An arrival pattern turns a number of tasks and a random generator into the instants, in seconds from the start
of the run, at which they are submitted. All are open loop: an instant does not depend on how the tasks before
it fared. MLPerf's closed scenarios (SingleStream, MultiStream) have no instants of their own and are marked
by `closed` in a `Schedule`.
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
"""(number of tasks, generator) -> instants in seconds, not falling."""


class Scenario(StrEnum):
    """MLPerf Inference's scenarios (LoadGen), as far as they say when queries are issued."""

    SINGLE_STREAM = "SingleStream"  # one sample a query, the next when the last has its result
    MULTI_STREAM = "MultiStream"  # eight samples a query, the next when the last has its results
    SERVER = "Server"  # one sample a query, Poisson arrivals at the target rate
    OFFLINE = "Offline"  # everything at once, at the start

    @property
    def closed(self) -> bool:
        """Whether a query waits for the one before it."""
        return self in (Scenario.SINGLE_STREAM, Scenario.MULTI_STREAM)

    @property
    def samples(self) -> int:
        """Samples of one query, unless the user says otherwise."""
        return 8 if self is Scenario.MULTI_STREAM else 1


def uniform(within_s: float) -> Arrivals:
    """The paper's (Section V-B): n tasks at uniformly drawn instants within `within_s` seconds, in order."""
    _positive("the interval", within_s)
    return lambda tasks, rng: sorted(float(instant) for instant in rng.uniform(0.0, within_s, tasks))


def constant(rate_per_s: float) -> Arrivals:
    """One task every 1 / rate seconds, the first at 0."""
    _positive("the request rate", rate_per_s)
    return lambda tasks, rng: [index / rate_per_s for index in range(tasks)]


def poisson(rate_per_s: float) -> Arrivals:
    """Exponential gaps with mean 1 / rate, the first task after one gap."""
    _positive("the request rate", rate_per_s)
    return lambda tasks, rng: [float(instant) for instant in np.cumsum(rng.exponential(1.0 / rate_per_s, tasks))]


def bursts(size: int, every_s: float) -> Arrivals:
    """`size` tasks at the same instant, every `every_s` seconds, the first burst at 0."""
    if size < 1:
        raise ConfigError(f"a burst has at least one task, not {size}")
    _positive("the time between bursts", every_s)
    return lambda tasks, rng: [index // size * every_s for index in range(tasks)]


def at_once() -> Arrivals:
    """Every task at 0 (MLPerf's Offline)."""
    return lambda tasks, rng: [0.0] * tasks


def intervals(gaps_s: Iterable[float]) -> Arrivals:
    """Recorded gaps: the first task arrives after the first gap; the list starts again when it is used up.

    Raises `ConfigError` for an empty list, or a gap that is negative or not finite.
    """
    gaps = [float(gap) for gap in gaps_s]
    if not gaps:
        raise ConfigError("there are no request intervals")
    for index, gap in enumerate(gaps):
        if not (gap >= 0 and math.isfinite(gap)):
            raise ConfigError(f"request interval {index} is {gap}, not a span of time")
    return lambda tasks, rng: np.cumsum([gaps[index % len(gaps)] for index in range(tasks)]).tolist()


def read_intervals(path: Path) -> list[float]:
    """Gaps in seconds from a file: one number a line (`#` begins a comment), or one JSON list.

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
        raise ConfigError(f"{what} must be over 0, not {value}")
