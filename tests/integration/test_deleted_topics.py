"""On a real Kafka: topics that are deleted during a run, and made again with fewer or more partitions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.kafka.bus import KafkaBus
from bus.kafka.connection import KafkaConnection
from bus.messages import Decision, Ended, SeedInput, TaskState, TaskSubmitted
from bus.topics import Partitions
from deploy.services import wiring
from tests.integration.deepar_processes import Process, Processes
from tests.kafka_broker import OwnBroker

MODELLED = ("--runner", "modelled", "--profile", "paper", "--model", "lenet")


async def until(holds: Callable[[], Awaitable[bool]], timeout_s: float = 90.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await holds():
            await asyncio.sleep(0.2)


async def delete(bootstrap: str, *names: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.delete_topics(list(names))
    finally:
        await admin.close()


class Tasks:
    """Submits tasks and follows their ends."""

    def __init__(self, bus: KafkaBus) -> None:
        self.bus = bus
        self.ends: dict[str, Ended] = {}
        self._log = DecisionLog()

    async def submit(self, first: int, count: int) -> set[str]:
        names = {f"t{number}" for number in range(first, first + count)}
        for name in sorted(names):
            task = TaskSubmitted(task_id=name, device="d1", model="lenet", samples=3, input=SeedInput(seed=1))
            await self.bus.send(topics.TASKS, messages.encode(task), key=name, partition=0)
        return names

    async def follow(self) -> None:
        reader = await self.bus.reader([(topics.DECISIONS, 0)], start="start")
        while True:
            for record in await reader.fetch():
                message = self._log.read(record)
                for change in message.changes if isinstance(message, Decision) else ():
                    if isinstance(change, Ended):
                        self.ends[change.task_id] = change

    async def complete(self, names: set[str]) -> None:
        async def all_ended() -> bool:
            return names <= self.ends.keys()

        await until(all_ended)
        assert {self.ends[name].state for name in names} == {TaskState.COMPLETED}, self.ends


def said(process: Process, words: str) -> int:
    return process.text().count(words)


@pytest.mark.parametrize("partitions", [1, 9])
async def test_topics_that_are_deleted_are_told_and_work_goes_on_when_they_are_made_again(
    kafka_own: OwnBroker, tmp_path: Path, partitions: int
) -> None:
    connection = KafkaConnection(bootstrap_servers=kafka_own.bootstrap)
    with Processes(kafka_own.bootstrap, tmp_path) as processes:
        planner = processes.start("planner", "planner", "--policy", "edge-only")
        await asyncio.to_thread(planner.wait_ready)
        edge = processes.start("e1", "stage", "edge", "--name", "e1", *MODELLED)
        device = processes.start("d1", "stage", "device", "--name", "d1", *MODELLED)
        for one in (edge, device):
            await asyncio.to_thread(one.wait_ready)
        async with KafkaBus(connection) as bus, wiring.embedded() as group:
            tasks = Tasks(bus)
            group.create_task(tasks.follow())
            await tasks.complete(await tasks.submit(0, 3))

            gone = (topics.RESULTS, topics.activations_topic("e1"))
            await delete(kafka_own.bootstrap, *gone)

            async def noticed() -> bool:
                return edge.ready() is None and device.ready() is None

            await until(noticed, 30.0)
            assert planner.ready() is not None  # it uses neither
            await asyncio.sleep(5.0)
            for one in (edge, device):
                assert said(one, "not ready: topics are missing") == 1, one.text()
                assert "deepar topics create" in one.text()
                assert said(one, "not found in cluster metadata") == 0

            made = Partitions(results=partitions, activations=partitions)
            await bus.create_topics(topics.specs(["e1"], made))

            async def well() -> bool:
                return edge.ready() is not None and device.ready() is not None

            await until(well, 30.0)
            await asyncio.sleep(6.0)  # until senders and the device have looked at the partitions again
            await tasks.complete(await tasks.submit(10, 6))
            assert "Unrecognized partition" not in edge.text() + device.text()
