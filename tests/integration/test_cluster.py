"""Three brokers, every record on three, acknowledged by two: the leader is killed, then the controller; nothing is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from bus.kafka import KafkaBus, KafkaConnection
from bus.topics import TopicSpec
from deploy.broker import START_LIMIT_S, KafkaBroker, free_port, new_cluster_id
from tests.kafka_broker import apache_required, choose

TOPIC = "cluster.records"
RECORDS_A_PHASE = 400
STALL_LIMIT_S = 60.0
COPIES = {
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
}


class Cluster:
    """Three nodes, each broker and controller, in processes of their own."""

    def __init__(self, folder: Path) -> None:
        ports = [free_port() for _ in range(6)]
        voters = ",".join(f"{number}@127.0.0.1:{ports[number + 2]}" for number in (1, 2, 3))
        cluster_id = new_cluster_id()
        self.nodes = {
            number: KafkaBroker(
                folder / str(number),
                port=ports[number - 1],
                controller_port=ports[number + 2],
                settings={"node.id": str(number), "controller.quorum.voters": voters, **COPIES},
                cluster_id=cluster_id,
                heap_mib=384,
                started_by="one of three, started by the tests",
            )
            for number in (1, 2, 3)
        }

    @property
    def bootstrap(self) -> str:
        return ",".join(node.bootstrap for node in self.nodes.values())

    def start(self) -> None:
        """None serves before two are up, so all are launched first."""
        began = max([node.launch() for node in self.nodes.values()])
        for node in self.nodes.values():
            node.wait(began + 2 * START_LIMIT_S)

    def stop(self) -> None:
        for node in self.nodes.values():
            node.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three brokers, up."""
    if choose().how != "apache":
        message = f"three brokers cannot be started here: {choose().text}"
        pytest.fail(message) if apache_required() else pytest.skip(message)
    one = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        one.start()
        yield one
    finally:
        one.stop()


async def _leader(cluster: Cluster) -> int:
    """The node that leads the topic's partition."""
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.bootstrap)
    await admin.start()
    try:
        (described,) = await admin.describe_topics([TOPIC])
        return int(described["partitions"][0]["leader"])
    finally:
        await admin.close()


def _controller(cluster: Cluster) -> int:
    """The node that leads the quorum, by what the nodes wrote into their logs: clients are told of any broker."""
    found = {}
    for number, node in cluster.nodes.items():
        for line in node.log_file.read_text(errors="replace").splitlines():
            if "Becoming the active controller" in line:
                found[line.split()[0]] = number
    return found[max(found)]


async def _sent(bus: KafkaBus, first: int, kept: dict[int, int], longest: list[float]) -> None:
    """Send records one after another; note the offset of each that is acknowledged, and the longest wait for one."""
    for number in range(first, first + RECORDS_A_PHASE):
        before_s = time.monotonic()
        position = await bus.send(TOPIC, str(number).encode(), key="k", partition=0)
        kept[number] = position.offset
        longest.append(time.monotonic() - before_s)
        await asyncio.sleep(0.005)


async def test_no_acknowledged_record_is_lost_or_doubled(cluster: Cluster) -> None:
    connection = KafkaConnection(bootstrap_servers=cluster.bootstrap, delivery_timeout_s=STALL_LIMIT_S)
    kept: dict[int, int] = {}
    stalls: dict[str, float] = {}
    async with KafkaBus(connection) as bus:
        await bus.create_topics([TopicSpec(TOPIC, 1)])
        for phase, victim_of in enumerate(("leader", "controller")):
            victim = await _leader(cluster) if victim_of == "leader" else _controller(cluster)
            waits: list[float] = []
            sending = asyncio.create_task(_sent(bus, phase * RECORDS_A_PHASE, kept, waits))
            while len(kept) < phase * RECORDS_A_PHASE + RECORDS_A_PHASE // 4:
                await asyncio.sleep(0.01)
                assert not sending.done(), sending.exception()
            cluster.nodes[victim].kill()
            async with asyncio.timeout(2 * STALL_LIMIT_S):
                await sending
            stalls[victim_of] = max(waits)
            if victim_of == "leader":  # two are enough to read
                cluster.nodes[victim].start(2 * START_LIMIT_S)
    print("longest wait for an acknowledgement:", {name: f"{stall:.1f} s" for name, stall in stalls.items()})

    there = await _read_all(cluster)
    assert len(kept) == 2 * RECORDS_A_PHASE
    lost = [number for number, offset in kept.items() if there.get(offset) != number]
    assert not lost
    assert len(there) == len(kept)  # none twice: producers are idempotent
    assert max(stalls.values()) < STALL_LIMIT_S


async def _read_all(cluster: Cluster) -> dict[int, int]:
    """Every record of the topic by its offset."""
    async with KafkaBus(KafkaConnection(bootstrap_servers=cluster.bootstrap)) as bus:
        reader = await bus.reader([(TOPIC, 0)], start="start")
        found = {}
        while await reader.lag():
            for record in await reader.fetch():
                found[record.offset] = int(record.value or b"-1")
    return found
