"""Comparison of simulation and live run: one scenario in virtual time and on Kafka, compared task by task.

Both runs use modelled machines and are slowed down so that every station takes at least 20 ms per sample; with shorter
times, timer resolution and broker latency would dominate the difference. Bandwidths shrink by the factor by which
compute times and arrivals grow, so the decisions equal those of the original scenario. Latencies and traces are not
stretched: both runs play what was asked for.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import uvloop

from bus import topics
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.messages import TaskState
from bus.values import STATIONS
from loadgen.experiments.comparison.live_services import running
from loadgen.replay.outcome import Outcome, Recorder
from loadgen.replay.readiness import await_nodes
from loadgen.replay.replay import Observers, ReplayResult, replay
from loadgen.sim.core_driver import drive
from loadgen.sim.platforms import Platforms
from loadgen.sim.scenario import Scenario, edge_name
from loadgen.sim.simulator import simulate

MIN_STATION_S = 0.020
"""Minimum time of a station per sample, for the stations that a task uses."""

SCENARIO = Scenario(
    name="compare",
    devices=20,
    tasks=60,
    edges=4,
    reachable=2,
    within_s=12.0,
    models={"alexnet": 1.0, "vgg16": 1.0, "deepface": 1.0},
    samples=(1, 12),
    input_bytes=(100_000, 600_000),
    edge_link1_bps=(0.2e9, 0.6e9),
    edge_link2_bps=(0.03e9, 0.1e9),
    slots=(1, 3),
)
"""Sixty tasks that compete for four edges; LeNet is left out, since its stations would stretch the rest by hundreds."""

JOIN_TIMEOUT_S = 60.0
_LEASE_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """The two runs and their agreement."""

    scenario: Scenario  # as run, with stretched times
    time_scale: float
    simulated: tuple[Outcome, ...]
    live: tuple[Outcome, ...]

    @property
    def pairs(self) -> list[tuple[Outcome, Outcome]]:
        """Pairs (simulated, live) of the tasks that completed in both runs."""
        by_id = {outcome.task_id: outcome for outcome in self.live}
        return [
            (one, by_id[one.task_id])
            for one in self.simulated
            if one.delay_s is not None and by_id[one.task_id].delay_s is not None
        ]

    @property
    def same_placement(self) -> float:
        """Share of all tasks with the same kind, edge and cuts."""
        by_id = {outcome.task_id: outcome for outcome in self.live}
        same = sum(one.where == by_id[one.task_id].where for one in self.simulated)
        return same / len(self.simulated)

    def as_object(self) -> dict[str, Any]:
        """What `deepar simulate compare --json` prints, without `files`."""
        simulated = np.array([one.delay_s for one, _ in self.pairs], dtype=float)
        live = np.array([other.delay_s for _, other in self.pairs], dtype=float)
        errors = np.abs(live / simulated - 1)
        return {
            "scenario": self.scenario.name,
            "time_scale": self.time_scale,
            "tasks": len(self.simulated),
            "completed": sum(outcome.state is TaskState.COMPLETED for outcome in self.live),
            "same_placement": self.same_placement,
            "mean_ratio": float(live.mean() / simulated.mean()),
            "median_error": float(np.median(errors)),
            "p90_error": float(np.percentile(errors, 90)),
            "correlation": float(np.corrcoef(simulated, live)[0, 1]),
            "waited": {
                "simulated": sum((one.wait_s or 0) > 0.05 for one in self.simulated),
                "live": sum((one.wait_s or 0) > 0.05 for one in self.live),
            },
        }

    @property
    def agrees(self) -> bool:
        """Whether 95 % of placements are equal, means within 5 %, the median error at most 10 %, and all tasks completed."""
        found = self.as_object()
        return bool(
            found["completed"] == found["tasks"]
            and found["same_placement"] >= 0.95
            and abs(found["mean_ratio"] - 1) <= 0.05
            and found["median_error"] <= 0.10
        )


def compare(
    platforms: Platforms,
    connection: KafkaConnection,
    *,
    scenario: Scenario = SCENARIO,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Recorder], None] | None = None,
) -> Comparison:
    """Run both. The broker should be idle and its region 0 unused. Raises `BusError`, `ConfigError`."""
    scale = time_scale_of(scenario, seed, platforms)
    scenario, platforms = stretched(scenario, platforms, scale)
    schedule = scenario.schedule(seed)
    say(f"time scale {scale:.1f}: {len(schedule)} tasks within {schedule.span_s:.0f} s; simulating")
    simulated = simulate(scenario, seed, platforms, schedule=schedule).outcomes
    last_s = max(outcome.ended_s or 0.0 for outcome in simulated)
    say(f"running live, about {last_s:.0f} s")
    nodes = scenario.nodes(seed, platforms.profiles, lease_s=_LEASE_S)
    with running(scenario, nodes, connection):

        async def run() -> ReplayResult:
            async with KafkaBus(connection) as bus:
                await bus.create_topics(topics.specs([edge_name(index) for index in range(scenario.edges)]))
                await await_nodes(bus, 0, [node.node for node in nodes], timeout_s=JOIN_TIMEOUT_S)
                return await replay(
                    bus, schedule, drain_timeout_s=4 * _longest(simulated) + 30, observers=Observers(progress=progress)
                )

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            live = runner.run(run()).outcomes
    return Comparison(scenario, scale, simulated, live)


def time_scale_of(scenario: Scenario, seed: int, platforms: Platforms) -> float:
    """Factor on all times so that the fastest station of any placement takes `MIN_STATION_S` per sample."""
    scenario = dataclasses.replace(scenario, link1_trace=None, link2_trace=None)  # only stages play traces
    fastest_s = min(
        (
            busy_s / outcome.samples
            for outcome in drive(scenario, seed, platforms)
            for station in STATIONS
            if outcome.predicted is not None and (busy_s := getattr(outcome.predicted, f"{station}_s")) > 0
        ),
        default=MIN_STATION_S,
    )
    return max(1.0, MIN_STATION_S / fastest_s)


def stretched(scenario: Scenario, platforms: Platforms, scale: float) -> tuple[Scenario, Platforms]:
    """Multiply compute times and arrivals by `scale` and divide bandwidths by it, which keeps the decisions the same.

    Latencies and traces are played as they are.
    """

    rates = ("max_link1_bps", "max_link2_bps", "edge_link1_bps", "edge_link2_bps")
    changes: dict[str, Any] = {"within_s": scenario.within_s * scale}
    for name in rates:
        limits = getattr(scenario, name)
        if limits is not None:
            changes[name] = (limits[0] / scale, limits[1] / scale)
    return dataclasses.replace(scenario, **changes), dataclasses.replace(
        platforms,
        profiles={
            role: tuple(profile.slowed(scale) for profile in profiles) for role, profiles in platforms.profiles.items()
        },
        link1_bps=round(platforms.link1_bps / scale),
        link2_bps=round(platforms.link2_bps / scale),
    )


def _longest(outcomes: Sequence[Outcome]) -> float:
    return max(outcome.delay_s or 0.0 for outcome in outcomes)
