"""Log events of services: readiness, joining, and tasks that the planner rejects."""

from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

from bus.messages import TaskState
from loadgen.sim.virtual_loop import run_virtual
from tests.sim.world import task, world

NODES = {"d1", "d2", "d3", "e1", "e2", "c1"}


def test_every_node_logs_once_that_it_is_ready_and_that_it_joined() -> None:
    async def main() -> None:
        async with world():
            await asyncio.sleep(30.0)

    with capture_logs() as logged:
        run_virtual(main())
    for event in ("ready", "joined the region"):
        assert sorted(line["node"] for line in logged if line["event"] == event) == sorted(NODES)


def test_the_planner_logs_each_rejection_with_its_cause_up_to_a_rate() -> None:
    many = 300

    async def main() -> list[TaskState | None]:
        async with world() as region:
            unknown = [task(number).model_copy(update={"model": "unheard_of"}) for number in range(many)]
            return [outcome.state for outcome in (await region.replay([task(1000), *unknown], gap_s=0.001)).values()]

    with capture_logs() as logged:
        states = run_virtual(main())
    assert states.count(TaskState.REJECTED) == many
    rejected = [line for line in logged if line["event"] == "task rejected"]
    assert rejected[0]["task"] == "t0"
    assert {line["cause"] for line in rejected} == {"unknown_model"}
    assert all("unheard_of" in line["detail"] for line in rejected)
    assert 90 <= len(rejected) < many, "many rejections are logged up to a rate limit only"
