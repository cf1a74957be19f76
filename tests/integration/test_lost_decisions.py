"""On a real Kafka: decisions that are deleted under a stopped device and under a planner that comes back."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from bus import messages, snapshots, topics
from bus.kafka.bus import KafkaBus
from bus.kafka.connection import KafkaConnection
from bus.messages import Ended, SeedInput, TaskState, TaskSubmitted
from tests.integration.deepar_processes import Processes
from tests.kafka_broker import OwnBroker


async def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.1)


async def submit(bus: KafkaBus, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        task = TaskSubmitted(task_id=f"t{number}", device="d1", model="lenet", samples=1, input=SeedInput(seed=number))
        await bus.send(topics.TASKS, messages.encode(task), key=task.task_id, partition=0)


async def delete_before(bootstrap: str, offset: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(topics.DECISIONS, 0): RecordsToDelete(before_offset=offset)})
    finally:
        await admin.close()


async def newest_snapshot(bus: KafkaBus) -> int:
    async with aclosing(snapshots.found(bus, 0)) as candidates:
        async for one in candidates:
            return one.snapshot.offset
    return 0


async def ended(bus: KafkaBus) -> dict[str, TaskState]:
    """The tasks whose end can still be read."""
    found = {}
    reader = await bus.reader([(topics.DECISIONS, 0)], start="start")
    while await reader.lag():
        for record in await reader.fetch(timeout_s=0.5):
            message = messages.decode(topics.DECISIONS, record.value)
            for change in getattr(message, "changes", ()):
                if isinstance(change, Ended):
                    found[change.task_id] = change.state
    await reader.close()
    return found


async def test_a_stopped_device_reads_again_and_a_planner_does_not_begin_at_epoch_1(
    kafka_own: OwnBroker, tmp_path: Path
) -> None:
    connection = KafkaConnection(bootstrap_servers=kafka_own.bootstrap)
    with Processes(kafka_own.bootstrap, tmp_path) as processes:
        async with KafkaBus(connection) as bus:
            planner = processes.start("planner", "planner", "--snapshot-every", "5", "--policy", "device-only")
            await asyncio.to_thread(planner.wait_ready)
            words = ("--runner", "modelled", "--profile", "paper", "--model", "lenet", "--lease", "3s")
            device = processes.start("d1", "stage", "device", "--name", "d1", *words)
            await asyncio.to_thread(device.wait_ready)
            device.send(signal.SIGSTOP)
            before = (await bus.end_offsets(topics.DECISIONS))[0]
            await submit(bus, 12)
            async with asyncio.timeout(60.0):
                while await newest_snapshot(bus) <= before:
                    await asyncio.sleep(0.2)
            await delete_before(kafka_own.bootstrap, await newest_snapshot(bus))
            device.send(signal.SIGCONT)
            await until(lambda: "decisions were missed" in device.text())
            await until(lambda: device.ready() is not None)
            await submit(bus, 3, first=100)
            async with asyncio.timeout(60.0):
                while {"t100", "t101", "t102"} - (done := await ended(bus)).keys():
                    await asyncio.sleep(0.5)
            assert done["t102"] is TaskState.COMPLETED

            planner.end(signal.SIGKILL)
            end = (await bus.end_offsets(topics.DECISIONS))[0]
            await delete_before(kafka_own.bootstrap, end)
            refused = await asyncio.to_thread(processes.run, "planner", "--take-over")
            assert refused.returncode == 2, refused.stderr
            assert "region 0: decisions from offset 0 on were deleted" in refused.stderr
            assert "no snapshot covers them" in refused.stderr
            assert (await bus.end_offsets(topics.DECISIONS))[0] == end
