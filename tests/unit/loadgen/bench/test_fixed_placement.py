"""The director of the benchmarks leads a region like a planner: a planner can follow it, and it deposes no planner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from bus import messages, topics
from bus.errors import ConfigError
from bus.frames import AttemptPlan
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import EpochOpened
from bus.tensors import Array
from bus.values import Execution, ModelProfile, Role
from loadgen.bench.fixed_placement import Staged
from loadgen.sim.virtual_loop import run_virtual
from planner.core.core import PlannerCore
from planner.service.service import PlannerService, Standing
from stages.runner import ModelledRunner, PaceClock, Station

PROFILE = ModelProfile(
    model="toy",
    sha256="0" * 64,
    platform="toy",
    layer_names=("front", "middle", "rest"),
    layer_s=(0.1, 0.1, 0.1),
    cut_bytes=(1000, 1000, 1000, 10),
)


def staged(broker: MemoryBroker) -> Staged:
    runners = {role: ModelledRunner([PROFILE]) for role in Role}
    return Staged(lambda client: MemoryBus(broker, client), runners, PROFILE, cuts=(1, 2), rates_bps=(10**6, 10**6))


Found = tuple[Standing, list[str], int]
CLEAN: Found = (Standing.LEADING, [], 0)


async def followed(broker: MemoryBroker) -> Found:
    """What a planner that comes after it finds: whether it leads, who is there, how many tasks live."""
    async with MemoryBus(broker, "planner") as bus:
        service = PlannerService(bus, lambda: PlannerCore(0))
        task = asyncio.create_task(service.run())
        await asyncio.sleep(2.0)
        found = service.standing, sorted(service.core.nodes), service.core.live_tasks
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return found


def test_a_planner_can_follow_it() -> None:
    async def run() -> Found:
        broker = MemoryBroker()
        for _ in range(2):  # and it can follow itself
            async with staged(broker) as stages:
                assert await stages.play(3, Execution.STREAMING) > 0.3
        return await followed(broker)

    assert run_virtual(run(), horizon_s=1000.0) == CLEAN


class BrokenRunner(ModelledRunner):
    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        raise ConfigError("broken")


def test_a_task_that_fails_leaves_the_region_clean() -> None:
    async def run() -> Found:
        broker = MemoryBroker()
        runners = {role: ModelledRunner([PROFILE]) for role in Role} | {Role.EDGE: BrokenRunner([PROFILE])}
        with pytest.raises(RuntimeError, match="broken"):
            async with Staged(
                lambda c: MemoryBus(broker, c), runners, PROFILE, cuts=(1, 2), rates_bps=(10**6, 10**6)
            ) as one:
                await one.play(3, Execution.STREAMING)
        return await followed(broker)

    assert run_virtual(run(), horizon_s=1000.0) == CLEAN


class LateStation:
    """A station on a loop whose timers fire late."""

    def __init__(self, inner: Station) -> None:
        self._inner = inner

    @property
    def waited_s(self) -> float:
        return self._inner.waited_s

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        outputs = await self._inner.run(sample, inputs, ready_s)
        await asyncio.sleep(0.02)
        return outputs

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return None

    def close(self) -> None:
        self._inner.close()


class LateRunner(ModelledRunner):
    async def prepare(self, plan: AttemptPlan, first: int, last: int) -> None:
        await asyncio.sleep(1.0)  # is no part of a sample's time

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        return LateStation(super().station(plan, first, last, pace))


def test_late_timers_do_not_make_a_device_slower() -> None:
    """Its input was there before, so each sample is due from when the one before it was."""

    async def run() -> float:
        runners = {role: ModelledRunner([PROFILE]) for role in Role} | {Role.DEVICE: LateRunner([PROFILE])}
        broker = MemoryBroker()
        make = lambda client: MemoryBus(broker, client)  # noqa: E731
        async with Staged(make, runners, PROFILE, cuts=(1, 2), rates_bps=(10**6, 10**6)) as stages:
            return await stages.play(40, Execution.STREAMING)

    assert run_virtual(run(), horizon_s=1000.0) == pytest.approx(1.0 + 40 * 0.1, abs=0.35)


def test_it_takes_no_planner_s_place() -> None:
    async def run() -> None:
        broker = MemoryBroker()
        async with MemoryBus(broker, "somebody") as bus:
            await bus.create_topics(topics.specs())
            opened = EpochOpened(region=0, epoch=1, nonce="n", planner="theirs", lease_s=5.0)
            await bus.send(topics.DECISIONS, messages.encode(opened), key="0", partition=0)
        async with staged(broker):
            raise AssertionError("it must not get here")

    with pytest.raises(ConfigError, match="theirs leads region 0"):
        run_virtual(run(), horizon_s=1000.0)
