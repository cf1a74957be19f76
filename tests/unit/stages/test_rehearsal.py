"""A stage rehearses before it announces itself: the first task meets nothing that is done only once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from bus import messages, topics
from bus.errors import ModelError
from bus.frames import AttemptPlan
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import NodeAnnounced, TaskSubmitted
from bus.tensors import Array
from bus.values import ModelProfile, Role
from loadgen.sim.virtual_loop import run_virtual
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.membership.settings import NodeSettings
from stages.node import REHEARSAL_S, Node
from stages.rehearsal import rehearse
from stages.runner import ModelledRunner, PaceClock, Station
from stages.zoo.registry import digits, load_model
from tests.unit.stages.test_node import Idle

SHORT_S, LONG_S = 0.25, REHEARSAL_S + 1.0


def profile(model: str, layer_s: float) -> ModelProfile:
    return ModelProfile(
        model=model, sha256="0" * 64, platform="p", layer_names=("a",), layer_s=(layer_s,), cut_bytes=(400_000, 40)
    )


class Watched(ModelledRunner):
    """Notes which models run; those in `broken` cannot be prepared."""

    def __init__(self, profiles: Sequence[ModelProfile], broken: Sequence[str] = ()) -> None:
        super().__init__(profiles)
        self.ran: list[str] = []
        self._broken = broken

    async def prepare(self, plan: AttemptPlan, first: int, last: int) -> None:
        if plan.model in self._broken:
            raise ModelError(plan.model, "cannot be loaded")
        await super().prepare(plan, first, last)

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        self.ran.append(plan.model)
        return super().station(plan, first, last, pace)


async def announced_after(runner: ModelledRunner, *, rehearses: bool) -> float:
    """Seconds until a node with this runner announces itself."""
    broker = MemoryBroker()
    async with MemoryBus(broker, "n") as bus:
        await bus.create_topics(topics.specs(["n"]))
        settings = NodeSettings(name="n", role=Role.EDGE, slots=1, rehearses=rehearses)
        node = Node(bus, settings, runner)
        serving = asyncio.create_task(node.run(Idle(node)))
        clock = asyncio.get_running_loop().time
        begin_s = clock()
        (log,) = [log for log in broker.logs(topics.NODES) if log.partition == 0]
        async with asyncio.timeout(10.0):
            while not log.end:
                assert not node.status.ready, "ready means that the first task finds everything ready"
                await asyncio.sleep(0.01)
        assert isinstance(messages.decode(topics.NODES, log.read(0, 1)[0].value), NodeAnnounced)
        serving.cancel()
        await asyncio.wait([serving])
        return clock() - begin_s


def test_every_model_runs_once_before_the_node_announces_itself() -> None:
    runner = Watched([profile("a", SHORT_S), profile("b", SHORT_S)])
    assert run_virtual(announced_after(runner, rehearses=True)) == pytest.approx(2 * SHORT_S, abs=0.05)
    assert runner.ran == ["a", "b"]


def test_a_model_that_takes_too_long_is_not_rehearsed() -> None:
    runner = Watched([profile("long", LONG_S), profile("a", SHORT_S)])
    assert run_virtual(announced_after(runner, rehearses=True)) < 2 * SHORT_S
    assert runner.ran == ["a"]


def test_a_model_that_fails_keeps_neither_the_node_nor_other_models_away() -> None:
    runner = Watched([profile("a", SHORT_S), profile("b", SHORT_S)], broken=["a"])
    assert run_virtual(announced_after(runner, rehearses=True)) < 2 * SHORT_S
    assert runner.ran == ["b"]


def test_rehearsals_end_after_their_limit() -> None:
    runner = Watched([profile(f"m{number}", REHEARSAL_S / 2 - 0.1) for number in range(5)])
    assert run_virtual(announced_after(runner, rehearses=True)) == pytest.approx(REHEARSAL_S, abs=0.05)
    assert runner.ran == ["m0", "m1", "m2"]


def test_a_rehearsal_opens_the_inputs_that_tasks_of_the_model_use() -> None:
    asked: list[str] = []

    class Asked(LitertRunner):
        def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
            asked.append(task.input.type)
            return super().open_input(task)

    async def run() -> float:
        model = load_model("lenet")
        runner = await asyncio.to_thread(
            Asked, [model], RunnerOptions(), prepared=Prepared(profiles={"lenet": lenet_profile()})
        )
        digits.cache_clear()
        took_s = await rehearse(runner, lenet_profile(), packs=True)
        await runner.close()
        return took_s

    assert asyncio.run(run()) > 0.0
    assert asked == ["seed", "dataset"]
    assert digits.cache_info().currsize == 1, "reading the pictures takes several times as long as a sample"


def lenet_profile() -> ModelProfile:
    """LeNet's shape with made-up times."""
    model = load_model("lenet")
    layers = model.manifest.layers
    return ModelProfile(
        model="lenet",
        sha256=model.sha256,
        platform="p",
        layer_names=tuple(f"l{number}" for number in range(layers)),
        layer_s=(1e-5,) * layers,
        cut_bytes=(3136,) * (layers + 1),
    )
