"""`/readyz` and `/metrics` of a stage say which segments are computed in batches, and how many samples they have."""

from __future__ import annotations

from bus.memory.bus import MemoryBroker, MemoryBus
from bus.values import Role
from deploy.services.telemetry.metric_help import HELP
from deploy.services.telemetry.probes import Health
from deploy.services.wiring import Stage
from loadgen.sim.virtual_loop import run_virtual
from stages.membership.settings import NodeSettings
from stages.runner import ModelledRunner


class Batching(ModelledRunner):
    """Reports batches as the runner that computes does."""

    def __init__(self, segments: dict[str, str] | None) -> None:
        super().__init__([])
        self._segments = segments

    def batch_segments(self) -> dict[str, str] | None:
        return self._segments

    def batch_sizes(self) -> dict[int, int]:
        return {1: 2, 8: 3}


def health(segments: dict[str, str] | None) -> Health:
    async def look() -> Health:
        async with MemoryBus(MemoryBroker(), "n") as bus:
            return Stage(bus, NodeSettings(name="n", role=Role.CLOUD), Batching(segments)).look()

    return run_virtual(look())


def test_a_stage_reports_its_batches_and_the_segments_without() -> None:
    found = health({"alexnet 11..13": "", "alexnet 1..3": "a batch is only 1.02 times as fast"})
    assert found.detail["one_by_one"] == {"alexnet 1..3": "a batch is only 1.02 times as fast"}
    assert found.gauges["batch_segments"] == 1.0
    assert (found.counters["batches"], found.counters["batched_samples"]) == (5.0, 26.0)
    assert found.gauges.keys() | found.counters.keys() <= HELP.keys()


def test_a_stage_without_batches_reports_none() -> None:
    assert not any("batch" in name for name in (*health(None).gauges, *health(None).counters))
