"""Backpressure test with a cloud many times slower than its profile: the device must slow down and buffers stay bounded.

One long task runs with an accurate cloud and with a slow one. The two runs are compared by sample rate and by the
peak memory of edge and cloud relative to their published bounds.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bus import messages, topics
from bus.memory.bus import MemoryBus
from bus.messages import Ended, Placed, SeedInput, TaskSubmitted
from bus.topics import Partitions
from loadgen.chaos.soak.soak_region import SoakRegion, SoakScenario
from loadgen.sim.process import quiet, task_factory
from loadgen.sim.programs import REAL, Programs
from loadgen.sim.region import MODEL, VirtualStage, decided
from loadgen.sim.virtual_loop import run_virtual
from stages.hops.hop import ORPHAN_BYTES, Hop

FACTOR = 10.0
SAMPLES = 300
CASE = SoakScenario(hours=1.0, devices=1, edges=1, clouds=1, planners=1)


@dataclass(slots=True)
class Measurements:
    """What was measured in one run."""

    samples_per_s: float = 0.0
    kind: str = ""
    window: int = 0  # maximum number of samples in the pipeline
    under_way: int = 0  # peak number of samples in the pipeline
    # node -> peak of the bytes held, and the bound at that time
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)


def slow_cloud(factor: float = FACTOR, samples: int = SAMPLES, programs: Programs = REAL) -> dict[str, Any]:
    """Run both cases; report whether the slow cloud slowed the device and memory stayed within the bounds."""
    with quiet():
        accurate, slow = (run_virtual(_play(by, samples, programs), horizon_s=36_000.0) for by in (1.0, factor))
    within = all(peak["held_bytes"] <= peak["bound_bytes"] for peak in slow.peaks.values())
    return {
        "factor": factor,
        "samples": samples,
        "kind": slow.kind,
        "samples_per_s": {"as_said": accurate.samples_per_s, "slow": slow.samples_per_s},
        "window": slow.window,
        "under_way": slow.under_way,
        "buffers": slow.peaks,
        "within": within and slow.under_way <= slow.window and slow.samples_per_s < accurate.samples_per_s / 2,
    }


async def _play(factor: float, samples: int, programs: Programs) -> Measurements:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(task_factory)
    region, measured = SoakRegion(CASE, cloud_factor=factor, programs=programs), Measurements()
    async with MemoryBus(region.broker, "client") as client:
        await client.create_topics(topics.specs(region.edges, Partitions(cloud=1, results=1)))
        for name, stage in region.stages.items():
            region.processes[name].after = partial(_record_peaks, stage, measured)
        region.start()
        await region.all_joined()
        task = TaskSubmitted(task_id="long", device="d1", model=MODEL, samples=samples, input=SeedInput(seed=0))
        began_s = loop.time()
        await client.send(topics.TASKS, messages.encode(task), key=task.task_id, partition=0)
        async for change in decided(client):
            if isinstance(change, Placed):
                measured.kind = str(change.placement.kind)
            elif isinstance(change, Ended):
                break
        measured.samples_per_s = samples / (loop.time() - began_s)
        await region.end()
    return measured


def _record_peaks(stage: VirtualStage, measured: Measurements) -> None:
    """Called after each step of a stage: record how much it holds if that is more than before."""
    name, work = stage.settings.name, stage.work
    if isinstance(work, Hop):
        held = work.held_bytes
        peak = measured.peaks.get(name)
        if work.flows and (peak is None or held > peak["held_bytes"]):
            measured.peaks[name] = {"held_bytes": held, "bound_bytes": work.bound_bytes - ORPHAN_BYTES}
    elif work is not None:
        for task in work.tasks.values():
            if task.attempt is not None:
                measured.window = max(measured.window, task.attempt.window)
                measured.under_way = max(measured.under_way, task.attempt.under_way)
