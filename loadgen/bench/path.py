"""Path benchmark (`deepar loadgen bench path`): where the milliseconds of one task go in a region that runs on Kafka.

Tasks of one sample are submitted at a low rate to the first device. Then the time stamps of their records are read from the
topics. The broker stamps most records when it appends them, so the differences are on one clock, even when the stages run on
several machines. Records of `deepar.events` have the device's clock. Stamps are whole milliseconds; the rows are means.
"""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from statistics import fmean
from typing import Any, Final

import uvloop

from bus import messages, topics
from bus.errors import BusUnavailableError, ConfigError, ProtocolError
from bus.frames import decode_frame
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.messages import Decision, Ended, SeedInput, Start, TaskCompleted, TaskState, TaskSubmitted
from bus.port import Bus, Record, TopicPartition
from bus.values import Role
from loadgen.bench.cpu_load import BusynessWatch
from loadgen.replay.readiness import await_nodes, find_nodes
from loadgen.replay.replay import replay
from loadgen.replay.schedule import Entry, Schedule

Progress = Callable[[str], None]

TASKS, DROPPED = 60, 20
EVERY_S = 0.25
"""Interval between two tasks, so that each has the region to itself."""

STEPS: Final[Mapping[str, str]] = {
    "submitted": "",
    "started": "bus; planner reads, places and decides",
    "at edge": "bus; device reads, computes and sends",
    "at cloud": "bus; edge reads, computes and sends",
    "result": "bus; last stage reads, computes and sends",
    "completed": "bus; device finishes and sends the completion",
    "ended": "bus; planner reads and decides",
}
"""Records of a task in order, and what lies between a record and the one before it."""

_READY_S = 15.0


def run(
    bootstrap: str | None = None, *, tasks: int = TASKS, seed: int = 1, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure region 0 and return the object that docs/json.md describes.

    Raises `ConfigError` if no device has announced itself, and `BusUnavailableError` if it has no planner or a task fails.
    """

    async def measure() -> dict[str, Any]:
        async with KafkaBus(KafkaConnection.from_env(bootstrap_servers=bootstrap)) as bus, BusynessWatch() as watch:
            results = await measured(bus, tasks, seed, progress or (lambda line: None))
            seen = watch.seen()
        return {
            "bench": "path",
            "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, uvloop",
            "results": results,
            "aims": [],
            "busyness": seen.as_json(),
            "note": "the machine was too busy to judge" if seen.too_busy else "",
        }

    return uvloop.run(measure())


async def measured(bus: Bus, tasks: int, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """One row for each step of the path, and one for the whole."""
    devices = await find_nodes(bus, 0)
    if not devices:
        raise ConfigError("no device has announced itself in region 0", remedy="start one: deepar stage device")
    device = devices[0]
    await await_nodes(bus, 0, [device.node], timeout_s=_READY_S)
    edges = [edge.node for edge in await find_nodes(bus, 0, [Role.EDGE])]
    entries = [
        Entry(
            at_s=number * EVERY_S,
            task=TaskSubmitted(
                task_id=f"path-{os.getpid()}-{seed}-{number}",
                device=device.node,
                model=device.models[0].model,
                samples=1,
                input=SeedInput(seed=number),
            ),
        )
        for number in range(DROPPED + tasks)
    ]
    begin = await _ends(bus, edges)
    progress(f"{len(entries)} tasks of {device.models[0].model} for {device.node}, one every {EVERY_S:g} s")
    outcomes = (await replay(bus, Schedule(entries=tuple(entries), seed=seed), drain_timeout_s=_READY_S)).outcomes
    failed = [outcome for outcome in outcomes if outcome.state is not TaskState.COMPLETED]
    if failed:
        raise BusUnavailableError(f"{len(failed)} tasks did not complete, the first: {failed[0].cause or 'no end'}")
    stamps: dict[str, dict[str, int]] = defaultdict(dict)
    for partition, records in (await _read(bus, begin)).items():
        for record in records:
            for task_id, step in _steps(partition[0], record):
                stamps[task_id].setdefault(step, record.timestamp_ms)
    return _rows([stamps[entry.task.task_id] for entry in entries[DROPPED:]])


def _steps(topic: str, record: Record) -> Iterable[tuple[str, str]]:
    """The steps of tasks that a record stands for."""
    with suppress(ProtocolError):
        if topic == topics.TASKS:
            yield record.key or "", "submitted"
        elif topic == topics.DECISIONS:
            decision = messages.decode(topic, record.value)
            for change in decision.changes if isinstance(decision, Decision) else ():
                if isinstance(change, Start):
                    yield change.task_id, "started"
                elif isinstance(change, Ended):
                    yield change.task_id, "ended"
        elif topic == topics.EVENTS:
            event = messages.decode(topic, record.value)
            if isinstance(event, TaskCompleted):
                yield event.task_id, "completed"
        elif topic == topics.RESULTS:
            frame = decode_frame(record.value)
            if frame.kind == "result":
                yield frame.task_id, "result"
        else:
            yield record.key or "", "at cloud" if topic == topics.ACTIVATIONS_CLOUD else "at edge"


def _rows(stamps: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Means of the steps. Tasks that took other ways have other steps."""
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for at_ms in stamps:
        steps = [step for step in STEPS if step in at_ms]
        for before, after in [*pairwise(steps), ("submitted", "ended")]:
            taken[before, after].append((at_ms[after] - at_ms[before]) / 1000)
    order = list(STEPS)
    rows = sorted(taken.items(), key=lambda row: (row[0] == ("submitted", "ended"), *map(order.index, row[0])))
    return [
        {
            "from": before,
            "to": after,
            "mean_s": fmean(seconds),
            "tasks": len(seconds),
            "what": "all" if (before, after) == ("submitted", "ended") else STEPS[after],
        }
        for (before, after), seconds in rows
    ]


async def _ends(bus: Bus, edges: Iterable[str]) -> dict[TopicPartition, int]:
    """The ends of all topics that a task's records are in."""
    names = [topics.TASKS, topics.DECISIONS, topics.EVENTS, topics.RESULTS, topics.ACTIVATIONS_CLOUD]
    names += [topics.activations_topic(edge) for edge in edges]
    return {(name, number): end for name in names for number, end in (await bus.end_offsets(name)).items()}


async def _read(bus: Bus, begin: Mapping[TopicPartition, int]) -> dict[TopicPartition, list[Record]]:
    """All records from these offsets to the end."""
    found: dict[TopicPartition, list[Record]] = defaultdict(list)
    reader = await bus.reader(list(begin), start=begin)
    try:
        while await reader.lag():
            for record in await reader.fetch(timeout_s=0.5):
                found[record.topic, record.partition].append(record)
    finally:
        await reader.close()
    return found
