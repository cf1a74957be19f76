"""The path benchmark on a region in virtual time, where every step takes a known time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from bus.errors import ConfigError
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.topics import specs
from loadgen.bench.path import measured
from loadgen.sim.virtual_loop import run_virtual
from tests.sim.world import WorldOptions, world

LATENCY_S = 0.02


async def _measured(policy: str) -> dict[tuple[str, str], dict[str, Any]]:
    async with world(WorldOptions(policy=policy)) as region:
        region.broker.latency_s = LATENCY_S
        rows = await measured(region.bus, 5, 1, lambda line: None)
    return {(row["from"], row["to"]): row for row in rows}


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        ("device-only", ("submitted", "started", "completed", "ended")),
        ("edge-only", ("submitted", "started", "at edge", "result", "completed", "ended")),
        ("cloud-only", ("submitted", "started", "at edge", "at cloud", "result", "completed", "ended")),
    ],
)
def test_the_steps_of_a_task_add_up_to_the_whole(policy: str, steps: tuple[str, ...]) -> None:
    rows = run_virtual(_measured(policy))
    whole = rows.pop(("submitted", "ended"))
    assert list(rows) == list(pairwise(steps))
    assert {row["tasks"] for row in (whole, *rows.values())} == {5}
    assert sum(row["mean_s"] for row in rows.values()) == pytest.approx(whole["mean_s"])
    # The bus delivers after its latency; time stamps are whole milliseconds.
    assert all(row["mean_s"] > LATENCY_S - 0.002 for row in rows.values())
    assert rows["submitted", "started"]["mean_s"] == pytest.approx(LATENCY_S, abs=0.002)


def test_a_region_without_a_device_is_an_error_with_a_remedy() -> None:
    async def run() -> None:
        async with MemoryBus(MemoryBroker()) as bus:
            await bus.create_topics(specs(["e1"]))
            await measured(bus, 5, 1, lambda line: None)

    with pytest.raises(ConfigError, match="no device has announced itself"):
        run_virtual(run())
