"""Three brokers, every record on three, acknowledged by two: while a replay runs on the real planner and stages, the leader
of the decisions is killed, then the controller. What was acknowledged is there, and every result was shown once.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from bus import topics
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.messages import TaskState
from bus.port import Headers, Position, RecordValue
from bus.values import Role
from deploy.kafka_local.broker import START_LIMIT_S, BrokerOptions, KafkaBroker, new_cluster_id
from deploy.kafka_local.ports import free_port
from deploy.services import wiring
from loadgen.chaos.simulated.oracle import Oracle
from loadgen.replay.outcome import Recorder
from loadgen.replay.replay import Observers, replay
from loadgen.replay.schedule import Entry, Schedule
from planner.core.core import PlannerCore
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import ModelledRunner
from tests.kafka_broker import apache_required, choose
from tests.sim.world import profile, task

EDGES, DEVICES = ("e1", "e2"), ("d1", "d2")
WAVE, SAMPLES, APART_S = 12, 20, 0.6
"""So many tasks a replay, one replay after another until both kills are over: how long a broker takes to be back varies."""
UNDER_WAY = 4
"""So many tasks must have ended before a kill, and again after it."""
POLICY = "cloud-only"
"""Every topic is used: activations go to an edge, from there to the cloud, and results come back."""
STALL_LIMIT_S = 60.0
COPIES = {
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
    # As in the Compose file: with 2 s and 0.5 s a live broker that lacks CPU time is taken for dead beside the dead one.
    "broker.session.timeout.ms": "6000",
    "broker.heartbeat.interval.ms": "2000",
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
                BrokerOptions(
                    port=ports[number - 1],
                    controller_port=ports[number + 2],
                    settings={"node.id": str(number), "controller.quorum.voters": voters, **COPIES},
                    cluster_id=cluster_id,
                    heap_mib=384,
                ),
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
    """The node that leads the decisions of the region."""
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.bootstrap)
    await admin.start()
    try:
        (described,) = await admin.describe_topics([topics.DECISIONS])
        return int(described["partitions"][0]["leader"])
    finally:
        await admin.close()


def _controller(cluster: Cluster) -> int:
    """The node that leads the quorum, from the nodes' logs, since clients may be told another broker."""
    found = {}
    for number, node in cluster.nodes.items():
        for line in node.log_file.read_text(errors="replace").splitlines():
            if "Becoming the active controller" in line:
                found[line.split()[0]] = number
    return found[max(found)]


class Witness:
    """What was acknowledged, where it must stand, and how long each acknowledgement took."""

    def __init__(self) -> None:
        self.kept: dict[Position, bytes] = {}  # digest of the record at each acknowledged position
        self.twice: list[Position] = []
        self.waits: list[tuple[float, float]] = []  # when an acknowledgement came, and after how long
        self.shown: list[tuple[float, str, int]] = []  # when a result was shown, of which task and sample

    def stall_s(self, from_s: float, to_s: float) -> tuple[float, float]:
        """Within a span of time: the longest wait for an acknowledgement, the longest time without a result."""
        longest_s = max(wait_s for at_s, wait_s in self.waits if from_s <= at_s < to_s)
        at_s = [from_s, *(shown_s for shown_s, *_ in self.shown if from_s <= shown_s < to_s)]
        return longest_s, max(later - earlier for earlier, later in pairwise(at_s))


class WatchedBus(KafkaBus):
    """A bus whose acknowledgements are noted."""

    def __init__(self, connection: KafkaConnection, witness: Witness) -> None:
        super().__init__(connection)
        self._witness = witness

    async def post(
        self,
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[Position]:
        began_s = time.monotonic()
        digest = _digest(value)
        acknowledgement = await super().post(topic, value, key=key, partition=partition, headers=headers)
        assert isinstance(acknowledgement, asyncio.Future)

        def note(done: asyncio.Future[Position]) -> None:
            if done.cancelled() or done.exception() is not None:
                return
            now_s = time.monotonic()
            self._witness.waits.append((now_s, now_s - began_s))
            if done.result() in self._witness.kept:
                self._witness.twice.append(done.result())
            self._witness.kept[done.result()] = digest

        acknowledgement.add_done_callback(note)
        return acknowledgement


def _digest(value: RecordValue | None) -> bytes:
    return hashlib.sha256(value or b"").digest()


async def test_clients_that_start_before_a_death_is_noticed_wait_for_the_others(cluster: Cluster) -> None:
    """Retries, because for some seconds brokers still name the dead one as controller and as leader."""
    connection = KafkaConnection(bootstrap_servers=cluster.bootstrap, delivery_timeout_s=STALL_LIMIT_S)
    async with KafkaBus(connection) as bus:
        await wiring.create_missing_topics(bus, EDGES)
    partition = (topics.EVENTS, 0)

    async def client(number: int) -> None:
        async with KafkaBus(connection) as bus:
            await wiring.create_missing_topics(bus, [f"e{10 + number}"])
            ends = await bus.end_offsets(topics.EVENTS)
            async with asyncio.timeout(STALL_LIMIT_S):
                reader = await bus.reader([partition], start={partition: ends[0]})
                assert await reader.lag() >= 0  # the leader of a known position may be the dead one
                sent = await bus.send(topics.EVENTS, b"here", partition=0, key=f"{number}")
                assert sent.offset >= ends[0]
                while not any(record.offset == sent.offset for record in await reader.fetch()):
                    pass

    frozen = cluster.nodes[2].pid
    assert frozen is not None
    os.kill(frozen, signal.SIGSTOP)  # it accepts connections and never answers
    try:
        await asyncio.gather(*(client(number) for number in range(3)))
    finally:
        os.kill(frozen, signal.SIGCONT)
    for victim in (cluster.nodes[1], cluster.nodes[3]):
        victim.kill()
        await asyncio.gather(*(client(number) for number in range(3)))
        await asyncio.to_thread(victim.start, 2 * START_LIMIT_S)


async def test_the_leader_then_the_controller_is_killed_during_a_replay(cluster: Cluster) -> None:
    connection = KafkaConnection(bootstrap_servers=cluster.bootstrap, delivery_timeout_s=STALL_LIMIT_S)
    witness, recorder = Witness(), Recorder()
    killed_s: dict[str, float] = {}
    async with AsyncExitStack() as stack:

        async def bus() -> KafkaBus:
            return await stack.enter_async_context(WatchedBus(connection, witness))

        load, planning, staging = await bus(), await bus(), await bus()
        await wiring.create_missing_topics(load, EDGES)
        group = await stack.enter_async_context(wiring.embedded())
        group.create_task(wiring.make_planner(planning, wiring.PlannerSetup(policy=POLICY)).run())
        for node in (played := _cast(staging)):
            group.create_task(
                node.run(
                    wiring.make_work(node, lambda t, n, _: witness.shown.append((time.monotonic(), t.task_id, n))),
                )
            )
        await _until(lambda: all(node.status.joined for node in played))

        over = asyncio.Event()
        replaying = asyncio.create_task(_replay_until(over, load, recorder))
        for victim_of in ("leader", "controller"):
            await _more_ended(recorder, replaying)
            victim = await _leader(cluster) if victim_of == "leader" else _controller(cluster)
            killed_s[victim_of] = time.monotonic()
            cluster.nodes[victim].kill()
            if victim_of == "leader":  # two are enough to go on, and three are needed to lose another
                await asyncio.to_thread(cluster.nodes[victim].start, 2 * START_LIMIT_S)
                assert await _leader(cluster) != victim
        await _more_ended(recorder, replaying)
        over.set()
        await replaying
        over_s = time.monotonic()

    stalls = {
        "leader": witness.stall_s(killed_s["leader"], killed_s["controller"]),
        "controller": witness.stall_s(killed_s["controller"], over_s),
    }
    for victim_of, (unacknowledged_s, without_result_s) in stalls.items():
        print(
            f"{victim_of} killed: longest wait for an acknowledgement {unacknowledged_s:.1f} s, "
            f"longest time without a result {without_result_s:.1f} s"
        )
    written = {position.topic for position in witness.kept}
    print(f"{len(recorder.outcomes)} tasks, {len(witness.kept)} records acknowledged on {len(written)} topics")
    tasks = list(recorder.outcomes)
    assert {outcome.state for outcome in recorder.outcomes.values()} == {TaskState.COMPLETED}
    assert Counter((name, sample) for _, name, sample in witness.shown) == {
        (name, sample): 1 for name in tasks for sample in range(SAMPLES)
    }
    assert max(map(max, stalls.values())) < STALL_LIMIT_S

    there, oracle = await _read_back(cluster, witness)
    assert written >= {
        topics.TASKS, topics.DECISIONS, topics.EVENTS, topics.RESULTS, topics.ACTIVATIONS_CLOUD
    }  # fmt: skip
    assert [position for position, digest in witness.kept.items() if there.get(position) != digest] == []
    assert witness.twice == []
    oracle.finish(tasks, {})
    assert oracle.violations == []


def _cast(bus: KafkaBus) -> list[Node]:
    settings = [
        NodeSettings(name="c1", role=Role.CLOUD),
        *(
            NodeSettings(name=name, role=Role.EDGE, slots=2, link1_capacity_bps=10**8, link2_capacity_bps=5 * 10**7)
            for name in EDGES
        ),
        *(NodeSettings(name=name, role=Role.DEVICE) for name in DEVICES),
    ]
    return [Node(bus, one, ModelledRunner([profile(one.role)])) for one in settings]


async def _replay_until(over: asyncio.Event, bus: KafkaBus, recorder: Recorder) -> None:
    """One replay after another, the last until all its tasks have ended."""
    while not over.is_set():
        first = len(recorder.outcomes)
        entries = tuple(
            Entry(at_s=APART_S * n, task=task(first + n, DEVICES[n % 2], samples=SAMPLES)) for n in range(WAVE)
        )
        wave = Recorder()
        wave.outcomes = recorder.outcomes
        await replay(
            bus, Schedule(entries=entries), drain_timeout_s=2 * STALL_LIMIT_S, observers=Observers(recorder=wave)
        )


async def _more_ended(recorder: Recorder, replaying: asyncio.Task[None]) -> None:
    """Wait until some more tasks have ended, or the replay has failed."""
    before = _ended(recorder)
    await _until(lambda: _ended(recorder) >= before + UNDER_WAY or replaying.done())
    assert not replaying.done(), replaying.exception()


def _ended(recorder: Recorder) -> int:
    return sum(outcome.state is not None for outcome in recorder.outcomes.values())


async def _until(there: Callable[[], bool]) -> None:
    async with asyncio.timeout(2 * STALL_LIMIT_S):
        while not there():
            await asyncio.sleep(0.05)


async def _read_back(cluster: Cluster, witness: Witness) -> tuple[dict[Position, bytes], Oracle]:
    """Digests of every record of the topics that were written, from the two brokers that are left; the decisions, judged."""
    partitions: dict[str, set[int]] = defaultdict(set)
    for position in witness.kept:
        partitions[position.topic].add(position.partition)
    there: dict[Position, bytes] = {}
    oracle = Oracle(PlannerCore(0, policy=POLICY))
    async with KafkaBus(KafkaConnection(bootstrap_servers=cluster.bootstrap)) as bus:
        for topic, numbers in partitions.items():
            reader = await bus.reader([(topic, number) for number in sorted(numbers)], start="start")
            while await reader.lag():
                records = await reader.fetch()
                there |= {Position(r.topic, r.partition, r.offset): _digest(r.value) for r in records}
                if topic == topics.DECISIONS:
                    oracle.read(records)
            await reader.close()
    return there, oracle
