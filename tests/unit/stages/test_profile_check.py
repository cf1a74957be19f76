"""A profile that learning contradicts is measured again: by an idle node, not too often, and announced if it changed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise
from typing import Any

import pytest

from bus import messages, topics
from bus.errors import ModelError
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import Decision, EpochOpened, Learned, LearnedNode, LinkMeasurement, NodeAnnounced, NodeJoined
from bus.values import BatchSpeed, ModelProfile, Role
from loadgen.sim.virtual_loop import run_virtual
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.profile_check import AGAIN_S, BATCHES_S
from stages.runner import ModelledRunner
from stages.zoo.registry import load_model

PROFILE = ModelProfile(
    model="toy", sha256="0" * 64, platform="p", layer_names=("a",), layer_s=(0.01,), cut_bytes=(100, 8)
)


class Work:
    """Work of a node that is busy or not, as the test says."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.resting = True

    async def run(self) -> None:
        self.node.serving.set()
        await asyncio.Event().wait()

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None: ...

    def on_lost(self) -> None: ...

    def idle(self) -> bool:
        return self.resting

    def links(self) -> list[LinkMeasurement]:
        return []


class Measured(ModelledRunner):
    """A runner whose next measurements take these times; None fails."""

    def __init__(self, times_s: Iterable[float | None]) -> None:
        super().__init__([PROFILE])
        self.times_s = list(times_s)
        self.asked_s: list[float] = []

    async def remeasure(self, model: str) -> bool:
        self.asked_s.append(asyncio.get_running_loop().time())
        time_s = self.times_s.pop(0)
        if time_s is None:
            raise ModelError(model, "the disk is full")
        changed = self._profiles[model].layer_s != (time_s,)
        self._profiles[model] = PROFILE.model_copy(update={"layer_s": (time_s,)})
        return changed


BATCH = (BatchSpeed(batch=8, factors=(0.5,)),)


class Batching(Measured):
    """A runner that computes in batches once `started`, and whose measurement of them finds this, or fails (None)."""

    def __init__(self, found: tuple[BatchSpeed, ...] | None) -> None:
        super().__init__(())
        self.started, self.found = False, found

    def unmeasured_batches(self) -> str | None:
        return "toy" if self.started and not self.asked_s else None

    async def measure_batches(self, model: str) -> bool:
        self.asked_s.append(asyncio.get_running_loop().time())
        if self.found is None:
            raise ModelError(model, "the disk is full")
        self._profiles[model] = PROFILE.model_copy(update={"batch": self.found})
        return True


class Region:
    """One node, and a planner's pen."""

    def __init__(self, bus: MemoryBus, broker: MemoryBroker, runner: Measured) -> None:
        self.bus, self.broker, self.runner = bus, broker, runner
        settings = NodeSettings(name="n", role=Role.EDGE, slots=1, link1_capacity_bps=1, link2_capacity_bps=1)
        self.node = Node(bus, settings, runner)
        self.work = Work(self.node)
        self._seq = 0

    async def decide(self, *what: Any) -> None:
        self._seq += 1
        decision = Decision(
            region=0, epoch=1, nonce="n", seq=self._seq, now_s=0.0, inputs={}, changes=what, ledger_hash="h"
        )
        await self.bus.send(topics.DECISIONS, messages.encode(decision), key="0", partition=0)
        await asyncio.sleep(0.1)

    async def learn(self, factor: float, *, kept: int = 5, node: str = "n") -> None:
        learned = LearnedNode(
            node=node,
            model="toy",
            samples=10,
            profile_s=0.1,
            busy_s=0.1 * factor,
            factor=factor,
            overhead_s=0.0,
            kept=kept,
        )
        await self.decide(Learned(task_id="t", nodes=(learned,)))

    def announced(self) -> list[float]:
        return [one.layer_s[0] for one in self.profiles()]

    def profiles(self) -> list[ModelProfile]:
        """Those that were announced."""
        log = self.broker.logs(topics.NODES)[0]
        found = [messages.decode(topics.NODES, record.value) for record in log.read(0, log.end)]
        return [message.models[0] for message in found if isinstance(message, NodeAnnounced)]


@contextlib.asynccontextmanager
async def region(*times_s: float | None, runner: Measured | None = None) -> AsyncIterator[Region]:
    broker = MemoryBroker()
    async with MemoryBus(broker) as bus:
        await bus.create_topics(topics.specs(["n"]))
        opened = EpochOpened(region=0, epoch=1, nonce="n", planner="p", lease_s=60.0)
        await bus.send(topics.DECISIONS, messages.encode(opened), key="0", partition=0)
        made = Region(bus, broker, runner or Measured(times_s))
        task = asyncio.create_task(made.node.run(made.work))
        await asyncio.sleep(0.5)
        await made.decide(NodeJoined(node=made.node.announcement()))
        yield made
        assert not task.done(), task
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize("factor", [2.5, 0.3])
def test_a_contradicted_profile_is_measured_and_announced(factor: float) -> None:
    async def run() -> list[float]:
        async with region(0.03) as place:
            await place.learn(factor)
            assert len(place.runner.asked_s) == 1
            return place.announced()

    assert run_virtual(run()) == [0.01, 0.03]


@pytest.mark.parametrize(
    "what", [{"factor": 1.9}, {"factor": 0.6}, {"factor": 5.0, "kept": 2}, {"factor": 5.0, "node": "other"}]
)
def test_what_contradicts_nothing_is_left_alone(what: dict[str, Any]) -> None:
    async def run() -> tuple[list[float], list[float]]:
        async with region() as place:
            await place.learn(**what)
            return place.runner.asked_s, place.announced()

    assert run_virtual(run()) == ([], [0.01])


def test_a_busy_node_measures_when_it_is_idle_and_only_if_that_is_still_due() -> None:
    async def run() -> tuple[int, int, int]:
        async with region(0.03) as place:
            place.work.resting = False
            await place.learn(3.0)
            await asyncio.sleep(60.0)
            busy = len(place.runner.asked_s)
            await place.learn(1.1)  # it has recovered meanwhile
            place.work.resting = True
            await asyncio.sleep(5.0)
            recovered = len(place.runner.asked_s)
            await place.learn(3.0)
            return busy, recovered, len(place.runner.asked_s)

    assert run_virtual(run()) == (0, 0, 1)


def test_it_is_not_measured_often_and_more_rarely_where_it_is_confirmed() -> None:
    async def run() -> tuple[list[float], list[float]]:
        async with region(0.01, 0.01, None, 0.03, 0.01) as place:
            for _ in range(157):
                await place.learn(3.0)
                await asyncio.sleep(59.9)
            return place.runner.asked_s, place.announced()

    asked_s, announced = run_virtual(run())
    gaps_s = [after - before for before, after in pairwise(asked_s)]
    assert gaps_s == [pytest.approx(n * AGAIN_S, abs=61.0) for n in (2, 4, 8, 1)]
    assert announced == [0.01, 0.03, 0.01]


async def test_the_runner_measures_on_this_machine_and_keeps_a_profile_that_is_confirmed() -> None:
    model = load_model("lenet")
    times = iter((1.0, 1.05, 3.0))
    asked: list[bool] = []

    def measured(model: Any, *, num_threads: int, remeasure: bool, say: object) -> ModelProfile:
        asked.append(remeasure)
        cuts = tuple(cut.cut_bytes for cut in model.manifest.cuts)
        layers = len(cuts) - 1
        return ModelProfile(
            model=model.name, sha256=model.sha256, platform="here", layer_names=tuple("abcdefgh"[:layers]),
            layer_s=(next(times),) * layers, cut_bytes=cuts,
        )  # fmt: skip

    runner = LitertRunner([model], RunnerOptions(slowdown=2.0, platform="slow"), measured=measured)
    assert not await runner.remeasure("lenet")
    assert runner.profiles()[0].layer_s[0] == 2.0
    assert await runner.remeasure("lenet")
    assert (runner.profiles()[0].layer_s[0], runner.profiles()[0].platform) == (6.0, "slow")
    assert asked == [False, True, True]
    given = LitertRunner(
        [model], RunnerOptions(), prepared=Prepared(profiles={"lenet": runner.profiles()[0]}), measured=measured
    )
    assert not await given.remeasure("lenet")
    await runner.close()
    await given.close()


def test_batches_are_measured_by_an_idle_node_that_has_computed_some_and_announced() -> None:
    async def run() -> None:
        runner = Batching(BATCH)
        async with region(runner=runner) as place:
            await asyncio.sleep(3 * BATCHES_S)
            runner.started, place.work.resting = True, False
            await asyncio.sleep(3 * BATCHES_S)
            assert runner.asked_s == []
            place.work.resting = True
            await asyncio.sleep(3 * BATCHES_S)
            assert len(runner.asked_s) == 1
            assert [one.batch for one in place.profiles()] == [None, BATCH]

    run_virtual(run())


def test_a_node_whose_batches_cannot_be_measured_goes_on() -> None:
    async def run() -> None:
        runner = Batching(None)
        async with region(runner=runner) as place:
            runner.started = True
            await asyncio.sleep(3 * BATCHES_S)
            assert len(runner.asked_s) == 1
            assert [one.batch for one in place.profiles()] == [None]

    run_virtual(run())
