"""`deepar loadgen bench simulator` with a few hundred tasks instead of a million."""

import gc

import pytest

from bus.messages import TaskState
from loadgen.bench import simulator
from loadgen.bench.simulator import REGIONS, SCENARIO, drive_region, entries
from loadgen.replay.outcome import Outcome
from loadgen.sim.core_driver import Drive, core_for
from loadgen.sim.environment import Environment, LogNormal
from loadgen.sim.platforms import platforms


def test_the_report_contains_the_processor_time() -> None:
    report = simulator.run(tasks=100)
    (result,) = report["results"]
    assert (result["tasks"], result["completed"]) == (100, 100)
    assert len(result["region_processor_seconds"]) == REGIONS
    assert result["processor_seconds"] == max(result["region_processor_seconds"]) > 0
    assert result["processor_us_per_task"] == pytest.approx(sum(result["region_processor_seconds"]) / 100 * 1e6)
    wall, worked, growth = report["aims"]
    assert (wall["value"], worked["value"]) == (result["seconds"], result["processor_seconds"])
    assert wall["aim"] == worked["aim"] == pytest.approx(60.0 * 100 / 1e6)
    assert growth["value"] == 1.0


def test_the_same_seed_drives_the_same_region() -> None:
    one, two = (drive_region(100, 7) for _ in range(2))
    assert (one.tasks, one.waited, one.completed, one.in_flight) == (
        two.tasks,
        two.waited,
        two.completed,
        two.in_flight,
    )


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_core_makes_no_cycles(noise: float) -> None:
    """The benchmark runs the garbage collector rarely, so the objects of ended tasks must be freed without it."""
    ended: list[TaskState | None] = []

    def end(outcome: Outcome) -> None:
        ended.append(outcome.state)

    found = []
    for tasks in (20, 600):
        run = Drive(core_for(SCENARIO), end)
        if noise:
            run.world = Environment(platforms(SCENARIO.profile), LogNormal(noise, 1))
        run.announce(SCENARIO.nodes(1, platforms(SCENARIO.profile).profiles)[: 1 + SCENARIO.edges + tasks])
        gc.collect()
        gc.disable()
        try:
            run.run(entries(tasks, 1))
            found.append(gc.collect())
        finally:
            gc.enable()
    assert len(ended) == 620
    assert found[1] <= found[0] + 5  # a few generator frames, but not one for each task
