"""The number of threads for one inference on this machine, chosen by measuring the whole model.

More threads are not always faster: a small network loses more by waking them than it gains. The choice is stored beside the
profiles, so a restarted stage does not measure again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt

from bus.errors import ModelError
from stages.models.files.cache import measured_path, write_whole
from stages.models.model import Model
from stages.models.profiler import METHOD, Say, measuring_alone, processor_name
from stages.models.runtime.litert import SegmentRunner
from stages.models.verify import random_inputs

NEAR = 1.05
"""The fewest threads win that take at most this many times as long as the fastest number."""

RUNS = 10
"""Timed runs of the whole model with each number of threads; the shortest counts, because other load only lengthens a run."""

Time = Callable[[Model, int], float]
"""Seconds that one inference of the whole model takes with a number of threads."""


class ThreadTimes(BaseModel):
    """The shortest time of the whole model with each number of threads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    least_s: Annotated[Mapping[PositiveInt, NonNegativeFloat], Field(min_length=1)]  # by number of threads

    @property
    def best(self) -> int:
        """The fewest threads that are about as fast as the fastest number."""
        allowed_s = NEAR * min(self.least_s.values())
        return min(threads for threads, least_s in self.least_s.items() if least_s <= allowed_s)

    def summary(self, model: str) -> str:
        """The choice and its reason in one line."""
        times = ", ".join(f"{threads}: {least_s * 1e3:.3g} ms" for threads, least_s in sorted(self.least_s.items()))
        return f"threads for one inference of {model}: {self.best} (measured {times})"


def machine_threads(
    model: Model,
    *,
    remeasure: bool = False,
    say: Say | None = None,
    cores: int | None = None,
    time: Time | None = None,
) -> int:
    """The number of threads for this machine: stored, or measured with `time` if it is missing or `remeasure` is set.

    `cores`: the largest number to try; None: the cores that this process may use.
    """
    most = usable_cores() if cores is None else cores
    path = _path(model, most)
    found = None if remeasure else _stored(path)
    if found is None:
        with measuring_alone(say):
            found = None if remeasure else _stored(path)  # by the process that held the lock
            if found is None:
                if say is not None:
                    say(f"measuring how many threads suit {model.name} on this machine")
                found = ThreadTimes(least_s={count: (time or least_time_s)(model, count) for count in candidates(most)})
                _store(path, found, say)
    if say is not None:
        say(found.summary(model.name))
    return found.best


def candidates(cores: int) -> list[int]:
    """The numbers of threads to try: powers of two up to the number of cores, and that number."""
    return sorted({*(1 << power for power in range(cores.bit_length())), cores})


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def least_time_s(model: Model, num_threads: int, clock: Callable[[], float] = perf_counter) -> float:
    """The shortest of several runs of the whole model, after an untimed one. Raises `ModelError` if it cannot run here.

    Every number of threads is timed by the same clock; processor time, which profiles use for one thread, would favour it.
    """
    values = random_inputs(model, np.random.default_rng(0))
    given = dict(zip(model.graph.inputs, values, strict=True))
    inputs = [given[tensor] for tensor in model.graph.whole_inputs]
    whole = SegmentRunner(model.source, num_threads, title=str(model.path))
    whole.run(inputs)

    def once() -> float:
        begin_s = clock()
        whole.run(inputs)
        return clock() - begin_s

    return min(once() for _ in range(RUNS))


def _stored(path: Path) -> ThreadTimes | None:
    with contextlib.suppress(OSError, ValueError):
        return ThreadTimes.model_validate_json(path.read_bytes())
    return None


def _store(path: Path, found: ThreadTimes, say: Say | None) -> None:
    try:
        write_whole(path, [found.model_dump_json().encode()], durable=False)
    except ModelError as error:
        if say is not None:
            say(f"the number of threads was not stored: {error}")


def _path(model: Model, cores: int) -> Path:
    known_by = [str(METHOD), processor_name(), f"up to {cores}", model.sha256, metadata.version("ai-edge-litert")]
    return measured_path(f"{model.name}-threads", known_by)
