"""Simulator benchmark (`deepar loadgen bench simulator`): a million tasks through the real core, in two regions on two cores.

The policy is `deepar`. A region has 100 edges, four of them reachable from each device, about 1,000 tasks in flight, and
links and slots small enough that about a third of the tasks wait. The benchmark measures growth from 10,000 tasks on: if the
core scanned old tasks again, the time per task would rise with their number.

The goal is wall-clock time on two otherwise idle cores. On a busy machine `processor_seconds`, the processor time of the two
processes, is an upper estimate of it, because a shared core computes slower.

The garbage collector searches for cycles after 200,000 net allocations instead of 700. The core creates no cycles
(`tests/unit/loadgen/bench/test_simulator.py` verifies this), and with 8,000 live nodes each search costs tens of
milliseconds.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from bus.errors import ConfigError
from bus.messages import SeedInput, TaskState, TaskSubmitted
from bus.unchecked_constructors import maker
from loadgen.random_streams import Streams
from loadgen.rare_collection import rare_collection
from loadgen.replay.outcome import Outcome
from loadgen.replay.schedule import Entry
from loadgen.sim.core_driver import Drive, core_for
from loadgen.sim.platforms import platforms
from loadgen.sim.scenario import Scenario, device_name
from loadgen.workers import worker_pool

REGIONS = 2
TASKS = 1_000_000
SIZES = (10_000, 100_000)
"""Sizes of the smaller runs, from which the growth is measured."""

AIM_S = 60.0
LINEAR_WITHIN = 1.5
"""Maximum growth: time per task at a million tasks over that at 10,000. Caches and the heap's logarithm may cost this."""

SCENARIO = Scenario(
    name="bench-simulator",
    devices=8_000,
    edges=100,
    reachable=4,
    samples=(1, 1000),
    slots=(2, 12),
)
"""Figure 4's parameters, with slots such that a third of the tasks wait at this load."""

RATE_PER_S = 30.0
"""Arrivals per second in one region (Poisson): about 1,000 tasks in flight."""

BATCH = 10_000

COLLECT_AFTER = 200_000
"""Net allocations between two searches of the garbage collector."""


@dataclass(frozen=True, slots=True)
class RegionRun:
    """Measurements of one region's run."""

    tasks: int
    seconds: float  # of the drive alone, by the process's wall clock
    processor_seconds: float  # of the same, by the processor time of the process
    waited: int  # tasks that did not start when they arrived
    completed: int
    in_flight: float  # mean over virtual time, by Little's law


def run(*, tasks: int = TASKS, seed: int = 1, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure 10,000, 100,000 and `tasks` tasks. Returns the object that docs/json.md describes, with the growth added."""
    if tasks < REGIONS:
        raise ConfigError(f"--tasks {tasks}: must be at least {REGIONS}, one per region")
    say = progress or (lambda line: None)
    results: list[dict[str, Any]] = []
    for size in (*(size for size in SIZES if size < tasks), tasks):
        say(f"{size:,} tasks in {REGIONS} regions")
        results.append(_measure(size, seed))
    last = results[-1]
    growth = last["processor_us_per_task"] / results[0]["processor_us_per_task"]
    aims = [
        {"name": f"seconds for {tasks:,} tasks", "value": last["seconds"], "aim": AIM_S * tasks / TASKS},
        {
            "name": f"processor seconds of a region's process for {tasks:,} tasks in all",
            "value": last["processor_seconds"],
            "aim": AIM_S * tasks / TASKS,
        },
        {"name": f"time a task over that at {results[0]['tasks']:,}", "value": growth, "aim": LINEAR_WITHIN},
    ]
    for aim in aims:
        aim["pass"] = aim["value"] <= aim["aim"]
    return {
        "bench": "simulator",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "results": results,
        "aims": aims,
        "growth": growth,
        "regions": REGIONS,
    }


def _measure(tasks: int, seed: int) -> dict[str, Any]:
    share = tasks // REGIONS
    with worker_pool(min(REGIONS, os.cpu_count() or 1)) as pool:
        list(pool.map(_warm, range(REGIONS)))  # keeps import time out of the measurement
        began_s = time.perf_counter()
        runs = list(pool.map(drive_region, repeat(share), range(seed, seed + REGIONS)))
        seconds = time.perf_counter() - began_s
    done = sum(region.tasks for region in runs)
    return {
        "tasks": done,
        "seconds": seconds,
        "tasks_per_s": done / seconds,
        "delayed_share": sum(region.waited for region in runs) / done,
        "tasks_in_flight": sum(region.in_flight for region in runs) / len(runs),
        "completed": sum(region.completed for region in runs),
        "region_seconds": [region.seconds for region in runs],
        "region_processor_seconds": [region.processor_seconds for region in runs],
        "processor_seconds": max(region.processor_seconds for region in runs),
        "processor_us_per_task": sum(region.processor_seconds for region in runs) / done * 1e6,
    }


def _warm(region: int) -> None:
    drive_region(20, region)


def drive_region(tasks: int, seed: int) -> RegionRun:
    """One region with its own core, nodes and tasks."""
    counted = _Counted()
    run = Drive(core_for(SCENARIO), counted.end)
    run.announce(SCENARIO.nodes(seed, platforms(SCENARIO.profile).profiles))
    gc.collect()
    with rare_collection(COLLECT_AFTER):
        began_s, worked_s = time.perf_counter(), time.process_time()
        run.run(entries(tasks, seed))
        seconds, processor_seconds = time.perf_counter() - began_s, time.process_time() - worked_s
    in_flight = counted.delay_s / max(run.now_s, 1e-9)
    return RegionRun(tasks, seconds, processor_seconds, counted.waited, counted.completed, in_flight)


class _Counted:
    """Running sums, so that a million outcomes need not be kept."""

    def __init__(self) -> None:
        self.waited = self.completed = 0
        self.delay_s = 0.0

    def end(self, outcome: Outcome) -> None:
        """Count a task that has ended."""
        if outcome.state is TaskState.COMPLETED and outcome.started_s is not None:
            self.completed += 1
            self.waited += outcome.started_s > outcome.scheduled_s
            self.delay_s += (outcome.ended_s or 0.0) - outcome.scheduled_s


def entries(tasks: int, seed: int) -> Iterator[Entry]:
    """Poisson arrivals with the paper's draws, generated in batches to limit memory."""
    streams = Streams(seed)
    make = maker(TaskSubmitted)  # drawn from valid ranges
    devices = [device_name(index) for index in range(SCENARIO.devices)]
    mix = SCENARIO.mix
    names = list(mix.models)
    draws = {name: streams.stream(name) for name in ("gap", "model", "samples", "link1", "link2", "bytes")}
    source = SeedInput(seed=seed)
    at_s, number = 0.0, 0
    while number < tasks:
        count = min(BATCH, tasks - number)
        gaps = draws["gap"].exponential(1 / RATE_PER_S, count).tolist()
        picks = draws["model"].integers(0, len(names), count).tolist()
        samples = _whole(draws["samples"], mix.samples, count)
        link1, link2 = (
            _whole(draws[n], r, count) for n, r in (("link1", mix.max_link1_bps), ("link2", mix.max_link2_bps))
        )
        sizes = _whole(draws["bytes"], mix.input_bytes, count)
        for index in range(count):
            at_s += gaps[index]
            task = make(
                task_id=f"t{number}",
                device=devices[number % len(devices)],
                model=names[picks[index]],
                samples=samples[index],
                input=source,
                max_link1_bps=link1[index],
                max_link2_bps=link2[index],
                input_bytes=sizes[index],
            )
            yield Entry(at_s=at_s, task=task)
            number += 1


def _whole(rng: np.random.Generator, limits: tuple[float, float] | None, count: int) -> list[int]:
    assert limits is not None
    values: list[int] = rng.integers(round(limits[0]), round(limits[1]), count, endpoint=True).tolist()
    return values
