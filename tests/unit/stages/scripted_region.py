"""A device, an edge and two cloud stages with a scripted planner, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bus import messages, topics
from bus.frames import Frame, decode_frame, encode_frame
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import (
    Admitted,
    Change,
    Decision,
    Ended,
    EpochOpened,
    HandleInput,
    Placed,
    PlacedSession,
    Retried,
    SessionTerms,
    Start,
    TaskCompleted,
    TaskFailed,
    TaskState,
    TaskSubmitted,
)
from bus.topics import Partitions
from bus.values import Execution, Kind, ModelProfile, Objective, Parts, Placement, Role
from stages.components import StageComponents
from stages.devices.attempt import ResultSink
from stages.devices.device import Device
from stages.devices.session import DeviceSession, Keep
from stages.hops.hop import Hop, hop_of
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import Runner
from tests.numbered_frames import NumberingRunner

SIZE = 64
PROFILE = ModelProfile(
    model="toy", sha256="0" * 64, platform="p", layer_names=("a", "b", "c"), layer_s=(0.01,) * 3, cut_bytes=(SIZE,) * 4
)
ALONE = Placement(kind=Kind.DEVICE, cut1=3, cut2=3, cut1_name="c", cut2_name="c")
AT_EDGE = Placement(kind=Kind.DEVICE_EDGE, edge="e", cut1=1, cut2=3, cut1_name="a", cut2_name="c", link1_bps=4_000_000)
EVERYWHERE = Placement(
    kind=Kind.DEVICE_EDGE_CLOUD, edge="e", cut1=1, cut2=2, cut1_name="a", cut2_name="b", link1_bps=4_000_000,
    link2_bps=4_000_000,
)  # fmt: skip
RATE_HZ = 30.0
SESSION = TaskSubmitted(
    task_id="s", device="d", model="toy", samples=1, input=HandleInput(handle="s"),
    session=SessionTerms(rate_hz=RATE_HZ),
)  # fmt: skip


class ScriptedRegion:
    """The nodes, and the planner's pen."""

    def __init__(self, broker: MemoryBroker, bus: MemoryBus, on_result: ResultSink | None = None) -> None:
        self.broker, self._bus, self._on_result = broker, bus, on_result
        self.nodes: dict[str, Node] = {}
        self.works: dict[str, Device | Hop] = {}
        self.running: dict[str, asyncio.Task[None]] = {}
        self._seq = 0

    def start(self, settings: NodeSettings, runner: Runner, components: StageComponents | None = None) -> None:
        """Start a process of a node."""
        node = Node(self._bus, settings, runner, components=components)
        self.nodes[settings.name] = node
        work = self.works[settings.name] = (
            Device(node, self._on_result) if settings.role is Role.DEVICE else hop_of(node)
        )
        self.running[settings.name] = asyncio.create_task(node.run(work))

    async def kill(self, name: str) -> None:
        """End a process without draining it."""
        self.running[name].cancel()
        await asyncio.wait([self.running.pop(name)])

    @property
    def device(self) -> Device:
        work = self.works["d"]
        assert isinstance(work, Device)
        return work

    def hop(self, name: str) -> Hop:
        work = self.works[name]
        assert isinstance(work, Hop)
        return work

    async def decide(self, *changes: Change) -> None:
        """Publish a decision, and wait until the nodes have read it."""
        self._seq += 1
        decision = Decision(
            region=0, epoch=1, nonce="n", seq=self._seq, now_s=0.0, inputs={}, changes=changes, ledger_hash="h"
        )
        await self._bus.send(topics.DECISIONS, messages.encode(decision), key="0", partition=0)
        await asyncio.sleep(0.05)

    async def send(self, topic: str, frame: Frame, key: str | None = None) -> None:
        """Send a frame as another node would; its key is the task's name by default."""
        await self._bus.send(topic, encode_frame(frame), key=key or frame.task_id)

    async def open(self, placement: Placement, keep: Keep = Keep.ALL) -> DeviceSession:
        """A session that is placed and ready."""
        session = self.device.open_session(SESSION, keep)
        await self.decide(Admitted(task=SESSION), *placed_and_started(placement))
        await session.ready()
        return session

    async def move(self, placement: Placement, attempt: int, cause: str = "node_lost") -> None:
        """Place the session again."""
        retried = Retried(task_id="s", attempt=attempt, cause=cause)
        await self.decide(retried, *placed_and_started(placement, attempt))

    async def close(self, session: DeviceSession) -> TaskCompleted:
        """Close the session; returns what the device reported."""
        await session.close()
        await asyncio.sleep(0.05)
        await self.decide(Ended(task_id="s", attempt=1, state=TaskState.COMPLETED))
        completed = self.events()[-1]
        assert isinstance(completed, TaskCompleted)
        return completed

    def events(self) -> list[TaskCompleted | TaskFailed]:
        """What the nodes reported about tasks."""
        log = self.broker.logs(topics.EVENTS)[0]
        found = [messages.decode(topics.EVENTS, record.value) for record in log.read(0, log.end)]
        return [event for event in found if isinstance(event, TaskCompleted | TaskFailed)]

    def frames(self, topic: str) -> list[Any]:
        """The frames on a topic."""
        return [decode_frame(record.value) for log in self.broker.logs(topic) for record in log.read(0, log.end)]


def placed_and_started(placement: Placement, attempt: int = 1) -> tuple[Change, ...]:
    """The decision's changes for the session's placement."""
    return (
        Placed(
            task_id="s", attempt=attempt, device="d", model="toy", sha256="0" * 64, samples=1, policy="p",
            objective=Objective.PIPELINED, execution=Execution.STREAMING, placement=placement, start_s=0.0,
            wait_s=0.0, delay_s=0.03, parts=Parts(device_s=0.01, edge_s=0.01, cloud_s=0.01),
            session=PlacedSession(rate_hz=100.0),
        ),
        Start(task_id="s", attempt=attempt, device="d", at_s=0.0),
    )  # fmt: skip


@contextlib.asynccontextmanager
async def scripted_region(
    *,
    edges: Sequence[str] = ("e",),
    runner: Runner | None = None,
    components: StageComponents | None = None,
    cloud_region: int = 0,
    on_result: ResultSink | None = None,
    runners: Mapping[str, Runner] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> AsyncIterator[ScriptedRegion]:
    """A region with the device d, the edges, and the cloud stages c1 and c2, which may belong to another region.

    `runners` has the runners of some nodes by name; the others have `runner`. `settings` has more settings of some nodes.
    """
    broker = MemoryBroker(session_timeout_s=3.0)
    async with MemoryBus(broker) as bus:
        await bus.create_topics(topics.specs(edges, Partitions(regions=1 + cloud_region, cloud=2)))
        opened = EpochOpened(region=0, epoch=1, nonce="n", planner="p", lease_s=600.0)
        await bus.send(topics.DECISIONS, messages.encode(opened), key="0", partition=0)
        made = ScriptedRegion(broker, bus, on_result)
        roles = {"d": Role.DEVICE} | dict.fromkeys(edges, Role.EDGE) | dict.fromkeys(("c1", "c2"), Role.CLOUD)
        for name, role in roles.items():
            own = NodeSettings(name=name, role=role, region=cloud_region if role is Role.CLOUD else 0)
            if role is Role.EDGE:
                own = replace(own, slots=1, link1_capacity_bps=10_000_000, link2_capacity_bps=10_000_000)
            own = replace(own, **(settings or {}).get(name, {}))
            made.start(own, (runners or {}).get(name) or runner or NumberingRunner([PROFILE]), components)
        await asyncio.sleep(0.5)
        yield made
        for name, task in list(made.running.items()):
            assert not task.done(), task
            await made.kill(name)
