"""A device alone: what it does when results stay away, when its last process left results, and before it can listen."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
import pytest

from bus import messages, topics
from bus.errors import BusUnavailableError
from bus.frames import Frame, encode_frame
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import (
    Admitted,
    Decision,
    EpochOpened,
    Placed,
    SeedInput,
    Start,
    TaskCompleted,
    TaskFailed,
    TaskSubmitted,
)
from bus.tensors import to_pieces
from bus.topics import TopicSpec
from bus.values import Execution, Kind, ModelProfile, Objective, Parts, Placement, Role
from loadgen.sim.virtual_loop import run_virtual
from stages.devices.device import PARTITION_S, STALL_S, Device
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import ModelledRunner

PROFILE = ModelProfile(
    model="toy", sha256="0" * 64, platform="p", layer_names=("a", "b"), layer_s=(0.01, 0.01), cut_bytes=(100, 60, 8)
)
TASK = TaskSubmitted(task_id="t", device="d", model="toy", samples=4, input=SeedInput(seed=1))
ALONE = Placement(kind=Kind.DEVICE, cut1=2, cut2=2, cut1_name="b", cut2_name="b")
AT_EDGE = Placement(kind=Kind.DEVICE_EDGE, edge="e", cut1=1, cut2=2, cut1_name="a", cut2_name="b", link1_bps=1_000_000)


def changes(placement: Placement, attempt: int = 1, task: TaskSubmitted = TASK) -> tuple[Any, ...]:
    placed = Placed(
        task_id="t",
        attempt=attempt,
        device="d",
        model="toy",
        sha256="0" * 64,
        samples=4,
        policy="p",
        objective=Objective.PIPELINED,
        execution=Execution.STREAMING,
        placement=placement,
        start_s=0.0,
        wait_s=0.0,
        delay_s=1.0,
        parts=Parts(device_s=0.04),
    )
    return (Admitted(task=task), placed, Start(task_id="t", attempt=attempt, device="d", at_s=0.0))


class Region:
    """One device, and a planner's pen."""

    def __init__(
        self,
        bus: MemoryBus,
        broker: MemoryBroker,
        kept: Iterable[int],
        edges: tuple[str, ...] | None,
        runner: ModelledRunner,
    ) -> None:
        self.bus, self.broker = bus, broker
        self.shown: list[int] = []
        self.seq = 0  # of the last decision
        settings = NodeSettings(name="d", role=Role.DEVICE, reachable_edges=edges)
        self.node = Node(bus, settings, runner)
        self.device = Device(
            self.node, lambda task, sample, outputs: self.shown.append(sample), kept=lambda task_id: kept
        )

    async def decide(self, *what: Any) -> None:
        self.seq += 1
        decision = Decision(
            region=0, epoch=1, nonce="n", seq=self.seq, now_s=0.0, inputs={}, changes=what, ledger_hash="h"
        )
        await self.bus.send(topics.DECISIONS, messages.encode(decision), key="0", partition=0)

    def events(self) -> list[Any]:
        log = self.broker.logs(topics.EVENTS)[0]
        found = [messages.decode(topics.EVENTS, record.value) for record in log.read(0, log.end)]
        return [event for event in found if isinstance(event, TaskCompleted | TaskFailed)]


class Site(MemoryBus):
    """The bus of an edge's site, away at first if need be."""

    away = False

    async def partitions(self, topic: str) -> int:
        if self.away:
            raise BusUnavailableError("no broker at the site")
        return await super().partitions(topic)


class Routed(MemoryBus):
    """A bus that knows of the edge's site."""

    def __init__(self, broker: MemoryBroker, site: Site | None) -> None:
        super().__init__(broker)
        self.site = site

    def beside(self, topic: str, neighbour: str) -> MemoryBus:
        return self.site if self.site and neighbour == topics.activations_topic("e") else self


@contextlib.asynccontextmanager
async def region(
    kept: Iterable[int] = (),
    *,
    site: Site | None = None,
    edges: tuple[str, ...] | None = None,
    runner: ModelledRunner | None = None,
) -> AsyncIterator[Region]:
    broker = MemoryBroker()
    async with Routed(broker, site) as bus:
        await bus.create_topics(topics.specs(["e"]))
        opened = EpochOpened(region=0, epoch=1, nonce="n", planner="p", lease_s=60.0)
        await bus.send(topics.DECISIONS, messages.encode(opened), key="0", partition=0)
        made = Region(bus, broker, kept, edges, runner or ModelledRunner([PROFILE]))
        task = asyncio.create_task(made.node.run(made.device))
        await asyncio.sleep(0.5)
        yield made
        assert not task.done(), task
        task.cancel()
        await asyncio.wait([task])


def test_a_task_of_its_own_is_shown_and_reported() -> None:
    async def run() -> None:
        async with region() as r:
            await r.decide(*changes(ALONE))
            await asyncio.sleep(2.0)
            assert r.shown == [0, 1, 2, 3]
            (done,) = r.events()
            assert isinstance(done, TaskCompleted)

    run_virtual(run())


def test_results_that_outlived_the_last_process_are_neither_computed_nor_shown_again() -> None:
    async def run() -> None:
        async with region(kept=(0, 2)) as r:
            await r.decide(*changes(ALONE))
            await asyncio.sleep(2.0)
            assert r.shown == [1, 3]
            assert r.node.status.counters["device_busy_seconds"] < 0.05

    run_virtual(run())


def test_results_that_stay_away_make_it_ask_for_another_attempt() -> None:
    async def run() -> None:
        async with region() as r:
            await r.decide(*changes(AT_EDGE))  # there is no edge that would answer
            await asyncio.sleep(STALL_S)
            assert r.events() == []
            await asyncio.sleep(STALL_S)
            (failed,) = r.events()
            assert (failed.cause, failed.retryable) == ("stalled", True)

    run_virtual(run())


def test_a_broker_that_is_away_is_no_stall() -> None:
    async def run() -> None:
        async with region() as r:
            await r.decide(*changes(AT_EDGE))
            await asyncio.sleep(1.0)
            r.broker.pause()
            await asyncio.sleep(5 * STALL_S)
            r.broker.resume()
            await asyncio.sleep(STALL_S / 2)
            assert r.events() == []

    run_virtual(run())


def test_a_model_that_is_not_there_fails_the_task_and_not_the_device() -> None:
    async def run() -> None:
        async with region() as r:
            admitted, placed, start = changes(ALONE)
            await r.decide(admitted, placed.model_copy(update={"model": "other"}), start)
            await asyncio.sleep(1.0)
            (failed,) = r.events()
            assert (failed.cause, failed.retryable) == ("config", False)

    run_virtual(run())


def test_a_sink_that_fails_fails_its_task_and_not_the_device() -> None:
    async def run() -> None:
        async with region() as r:

            def full(task: TaskSubmitted, sample: int, outputs: Any) -> None:
                raise OSError("the disk is full")

            r.device._on_result = full
            await r.decide(*changes(ALONE))
            await asyncio.sleep(1.0)
            (failed,) = r.events()
            assert failed.cause == "stage_error"
            assert "the disk is full" in failed.detail

    run_virtual(run())


@pytest.mark.parametrize("edges", [None, ("e",)])
@pytest.mark.parametrize("away", [False, True])
def test_results_are_heard_at_the_site_of_the_edge(edges: tuple[str, ...] | None, away: bool) -> None:
    """Also where its broker came up after the device; and nothing is sent before they can be heard."""

    async def run() -> None:
        site = Site(MemoryBroker())
        async with site:
            await site.create_topics([spec for spec in topics.specs() if spec.name == topics.RESULTS])
            site.away = away
            async with region(site=site, edges=edges) as r:
                assert r.node.status.ready
                await r.decide(*changes(AT_EDGE))
                await asyncio.sleep(1.0)
                sent = r.broker.logs(topics.activations_topic("e"))[0].end
                assert (sent == 0) is away
                site.away = False
                await asyncio.sleep(1.0)
                assert r.broker.logs(topics.activations_topic("e"))[0].end > 0
                for sample in range(4):
                    pieces = tuple(to_pieces(sample, [np.zeros(8, np.uint8)], 1000))
                    await site.send(topics.RESULTS, encode_frame(Frame("result", "t", 1, "e", pieces)), key="d")
                await asyncio.sleep(2.0)
                assert r.shown == [0, 1, 2, 3]
                (done,) = r.events()
                assert isinstance(done, TaskCompleted)

    run_virtual(run())


@pytest.mark.parametrize("partitions", [1, 2, 9])
def test_a_device_goes_with_its_partition_where_results_are_made_again_with_other_partitions(partitions: int) -> None:
    async def run() -> None:
        async with region() as r:
            r.broker.delete_topic(topics.RESULTS)
            await asyncio.sleep(10.0)
            r.broker.create([TopicSpec(topics.RESULTS, partitions)])
            await r.decide(*changes(AT_EDGE))
            await asyncio.sleep(0.1)  # results that come before the device has looked are read all the same
            for sample in range(4):
                pieces = to_pieces(sample, [np.zeros(2, np.float32)], 1000)
                frame = Frame("result", "t", 1, "e", tuple(pieces))
                await r.bus.send(topics.RESULTS, encode_frame(frame), key="d")
            await asyncio.sleep(2 * PARTITION_S)
            assert r.shown == [0, 1, 2, 3]

    run_virtual(run())
