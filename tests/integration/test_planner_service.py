"""The planner on Kafka: killed twenty times during a replay, frozen and thawed, two for one region (G1, G3, G4)."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bus import topics
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.messages import SeedInput, TaskState, TaskSubmitted
from bus.topics import Partitions
from bus.values import Role
from deploy.services import wiring
from loadgen.replay.replay import replay
from loadgen.replay.schedule import Entry, Schedule
from planner.core.core import PlannerCore
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import ModelledRunner
from tests.decision_story import read_story
from tests.integration import planner_process
from tests.integration.deepar_processes import Process, Processes
from tests.kafka_broker import OwnBroker, choose, start_broker
from tests.sim.world import profile

KILLS = 20
TASKS = 500
LEADS, STANDS_BY = '"event": "leading"', '"event": "standing by"'


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnBroker]:
    """A broker of this module's own: each test has one of its regions to itself."""
    made = start_broker(choose(), tmp_path_factory.mktemp("kafka"))
    yield made
    made.stop()


def names(region: int, devices: int) -> dict[str, Role]:
    """Who is in a region: a cloud worker, two edges, some devices."""
    roles = {f"c-{region}": Role.CLOUD, f"e1-{region}": Role.EDGE, f"e2-{region}": Role.EDGE}
    return roles | {f"d{n}-{region}": Role.DEVICE for n in range(devices)}


@contextlib.asynccontextmanager
async def stages(bootstrap: str, region: int, devices: int) -> AsyncIterator[KafkaBus]:
    """A region's modelled stages, all in this process; they join once there is a planner."""
    roles = names(region, devices)
    async with KafkaBus(KafkaConnection(bootstrap_servers=bootstrap)) as bus:
        edges = [name for name, role in roles.items() if role is Role.EDGE]
        await bus.create_topics(topics.specs(edges, Partitions(regions=2, cloud=1)))
        async with wiring.embedded() as group:
            for name, role in roles.items():
                more: dict[str, Any] = {}
                if role is Role.EDGE:
                    more = {"slots": 4, "link1_capacity_bps": 1_000_000_000, "link2_capacity_bps": 200_000_000}
                settings = NodeSettings(name=name, role=role, region=region, lease_s=60.0, **more)
                node = Node(bus, settings, ModelledRunner([profile(role, 0.25)]))
                group.create_task(node.run(wiring.make_work(node)), name=name)
            yield bus


def schedule(region: int, devices: int, numbers: Sequence[int], gap_s: float) -> Schedule:
    """Tasks at a constant rate, the devices in turn."""
    return Schedule(
        entries=tuple(
            Entry(
                at_s=index * gap_s,
                task=TaskSubmitted(
                    task_id=f"t{number}",
                    device=f"d{number % devices}-{region}",
                    model="toy",
                    samples=1,
                    input=SeedInput(seed=number),
                ),
            )
            for index, number in enumerate(numbers)
        )
    )


async def _kill_planners(bootstrap: str, random: Random) -> multiprocessing.process.BaseProcess:
    """Start planners one after the other and kill each; half of them at any moment, half while they lead. The last lives."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([planner_process.__name__])

    def start(number: int) -> tuple[multiprocessing.process.BaseProcess, Callable[[], bool]]:
        leads = context.Event()
        arguments = (bootstrap, f"p{number}", 0, 0.5, 50, leads)
        process = context.Process(target=planner_process.serve, args=arguments, daemon=True)
        process.start()
        return process, leads.is_set

    for number in range(KILLS):
        process, leads = start(number)
        if number % 2 == 0:
            async with asyncio.timeout(60.0):
                while not leads():
                    await asyncio.sleep(0.02)
        await asyncio.sleep(random.uniform(0.0, 0.6))
        assert process.is_alive()
        process.kill()
        await asyncio.to_thread(process.join)
        assert process.exitcode == -signal.SIGKILL
    process, leads = start(KILLS)
    async with asyncio.timeout(60.0):
        while not leads():
            await asyncio.sleep(0.02)
    return process


async def test_a_planner_that_is_killed_twenty_times_forgets_nothing_and_decides_nothing_twice(
    broker: OwnBroker,
) -> None:
    devices = 4
    last = None
    async with stages(broker.bootstrap, 0, devices) as bus:
        async with asyncio.TaskGroup() as group:
            killing = group.create_task(_kill_planners(broker.bootstrap, Random(5)))
            playing = group.create_task(replay(bus, schedule(0, devices, range(TASKS), 0.04), drain_timeout_s=90.0))
        last = killing.result()
        result = playing.result()
        try:
            assert {outcome.state for outcome in result.outcomes} == {TaskState.COMPLETED}
            story = await read_story(bus, lambda: PlannerCore(0), validate_every=25)
        finally:
            last.kill()
    story.check({f"t{number}" for number in range(TASKS)})
    assert story.core.state_hash == story.decisions[-1].ledger_hash
    assert len(story.opened) > KILLS // 2


async def _say(process: Process, what: str, count: int = 1) -> None:
    """Wait until a planner has logged `what` `count` times."""
    until_s = time.monotonic() + 60.0
    while process.text().count(what) < count:
        assert process.process.poll() is None, process.text()
        assert time.monotonic() < until_s, f"{process.name} never said {what!r}:\n{process.text()}"
        await asyncio.sleep(0.05)


async def test_of_two_planners_one_works_and_the_other_stands_by_until_the_first_is_frozen_or_killed(
    broker: OwnBroker, tmp_path: Path
) -> None:
    devices, per_round = 2, 8
    with Processes(broker.bootstrap, tmp_path) as processes:
        async with stages(broker.bootstrap, 1, devices) as bus:

            async def work(turn: int) -> None:
                numbers = range(turn * per_round, (turn + 1) * per_round)
                result = await replay(bus, schedule(1, devices, numbers, 0.02), region=1, drain_timeout_s=60.0)
                assert {outcome.state for outcome in result.outcomes} == {TaskState.COMPLETED}

            def start(name: str) -> Process:
                return processes.start(name, "planner", "--name", name, "--region", "1", "--lease", "3s")

            first = start("first")
            await _say(first, LEADS)
            second = start("second")
            await _say(second, STANDS_BY)
            await work(0)
            assert LEADS not in second.text()

            first.send(signal.SIGSTOP)
            await _say(second, LEADS)
            await work(1)
            first.send(signal.SIGCONT)
            await _say(first, STANDS_BY)
            await work(2)

            second.end(signal.SIGKILL)
            await _say(first, LEADS, 2)
            await work(3)
            story = await read_story(bus, lambda: PlannerCore(1), region=1)
    story.check({f"t{number}" for number in range(4 * per_round)})
    assert [opened.planner for opened in story.opened] == ["first", "second", "first"]


async def test_planners_that_share_all_regions_divide_them_and_hand_them_over(
    broker: OwnBroker, tmp_path: Path
) -> None:
    async with KafkaBus(KafkaConnection(bootstrap_servers=broker.bootstrap)) as bus:
        await bus.create_topics(topics.specs([], Partitions(regions=2, cloud=1)))
        regions = await bus.partitions(topics.DECISIONS)

    def leads(process: Process) -> int:
        return list((process.ready() or {}).get("standing", {}).values()).count("leading")

    async def until(*wanted: tuple[Process, int]) -> None:
        async with asyncio.timeout(60.0):
            while [await asyncio.to_thread(leads, process) for process, _ in wanted] != [count for _, count in wanted]:
                await asyncio.sleep(0.1)

    with Processes(broker.bootstrap, tmp_path) as processes:

        def start(name: str) -> Process:
            return processes.start(name, "planner", "--name", name, "--regions", "all", "--lease", "1s")

        a = start("a")
        await until((a, regions))
        b = start("b")
        await until((a, 1), (b, 1))
        assert await asyncio.to_thread(a.end) == 0
        await until((b, regions))
