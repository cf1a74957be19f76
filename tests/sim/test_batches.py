"""Tasks that share a cloud that computes in batches: what is predicted comes true, and learned corrections apply on top."""

from __future__ import annotations

import asyncio
import random
from statistics import median
from typing import NamedTuple

import pytest

from bus import messages, topics
from bus.messages import Decision, Ended, Learned, Placed
from bus.values import BatchSpeed, ModelProfile, Role
from loadgen.replay.replay import replay
from loadgen.replay.schedule import Entry, Schedule
from loadgen.sim.virtual_loop import run_virtual
from stages.runner import ModelledRunner
from tests.sim.world import World, WorldOptions, profile, task, world

DEVICES = tuple(f"d{number}" for number in range(8))
ROUNDS = 6
HORIZON_S = 3600.0
FAST_BPS = 10**10


def cloud_profile(*, slower: float = 1.0, executors: int | None = None) -> ModelProfile:
    """A quarter of each layer's time is needed for each sample of a batch, the rest once."""
    one = profile(Role.CLOUD).slowed(slower)
    batch = tuple(BatchSpeed(batch=size, factors=(0.25 + 0.75 / size,) * one.layers) for size in (2, 4, 8, 16, 32))
    return one.model_copy(update={"batch": batch, "executors": executors})


class DifferentlyAnnounced(ModelledRunner):
    """A platform that announces another profile than its own."""

    def __init__(self, own: ModelProfile, announced: ModelProfile) -> None:
        super().__init__([own])
        self._announced = announced

    def profiles(self) -> tuple[ModelProfile, ...]:
        return (self._announced,)


class Done(NamedTuple):
    """A completed task."""

    placed: Placed
    ended: Ended
    learned: Learned | None

    @property
    def error(self) -> float:
        """Measured over predicted delay, minus 1."""
        assert self.ended.delay_s is not None
        return self.ended.delay_s / self.placed.delay_s - 1.0


def served(own: ModelProfile, announced: ModelProfile, *, devices: int = 8, learning: bool = False) -> list[Done]:
    """Devices that submit one task after another, all of which the cloud computes alone; in the order of their ends."""

    def make_runner(role: Role) -> ModelledRunner:
        return DifferentlyAnnounced(own, announced) if role is Role.CLOUD else ModelledRunner([profile(role)])

    options = WorldOptions(
        devices=DEVICES, edges=("e1",), slots=8, link1_bps=FAST_BPS, link2_bps=FAST_BPS, policy="cloud-only",
        learning=learning, make_runner=make_runner,
    )  # fmt: skip

    async def submit(place: World, number: int) -> None:
        grant = {"max_link1_bps": FAST_BPS // 10, "max_link2_bps": FAST_BPS // 10}
        rng = random.Random(number)
        tasks = [task(100 * number + at, DEVICES[number], rng.randrange(100, 300), **grant) for at in range(ROUNDS)]
        schedule = Schedule(entries=tuple(Entry(at_s=0.0, task=one) for one in tasks), closed=True)
        await replay(place.bus_of("loadgen", f"load{number}"), schedule, drain_timeout_s=600.0)

    async def run() -> list[Done]:
        async with world(options) as place:
            await asyncio.gather(*(submit(place, number) for number in range(devices)))
            placed: dict[str, Placed] = {}
            learned: dict[str | None, Learned] = {}
            done = []
            for record in place.broker.logs(topics.DECISIONS)[0].read(0, 1_000_000):
                decision = messages.decode(topics.DECISIONS, record.value)
                for change in decision.changes if isinstance(decision, Decision) else ():
                    if isinstance(change, Placed):
                        placed[change.task_id] = change
                    elif isinstance(change, Learned):
                        learned[change.task_id] = change
                    elif isinstance(change, Ended):
                        done.append(Done(placed[change.task_id], change, learned.get(change.task_id)))
            return done

    found = run_virtual(run(), horizon_s=HORIZON_S)
    assert len(found) == devices * ROUNDS
    return found


def settled(done: list[Done]) -> list[float]:
    """The errors of the tasks that ended after the first ones and before the load falls: eight are always under way."""
    return [abs(one.error) for one in done[len(DEVICES) : -len(DEVICES)]]


@pytest.mark.parametrize("executors", [None, 2])
def test_what_is_predicted_for_eight_tasks_at_once_comes_true(executors: int | None) -> None:
    one = cloud_profile(executors=executors)
    done = served(one, one)
    errors = settled(done)
    assert median(errors) < 0.05
    assert sum(error <= 0.15 for error in errors) >= 0.9 * len(errors)
    loads = [one.placed.placement.cloud_batch for one in done]
    assert {load.tasks for load in loads[-20:-8] if load is not None} == {8}
    for x in done[8:-8]:
        # in seconds of the cloud's time, too: the shares of batches are those that were measured
        assert x.ended.measured is not None
        assert x.ended.measured.cloud_s == pytest.approx(x.placed.parts.cloud_s, rel=0.06)


def test_without_batches_in_its_profile_a_cloud_is_predicted_to_be_much_faster_than_it_is() -> None:
    """So the test above shows something."""
    own = cloud_profile()
    errors = settled(served(own, own.without_batches()))
    assert min(errors) > 0.5


@pytest.mark.parametrize("executors", [None, 2])
def test_what_is_predicted_for_a_task_alone_comes_true(executors: int | None) -> None:
    """Its own samples are computed together."""
    one = cloud_profile(executors=executors)
    done = served(one, one, devices=1)
    assert max(abs(one.error) for one in done) < 0.1
    assert done[0].placed.parts.cloud_s < 0.7 * done[0].placed.samples * sum(one.layer_s)


def test_corrections_are_learned_relative_to_the_batches_that_there_were() -> None:
    """The first tasks are alone on the cloud in their predictions only, and it is twice as slow as announced."""
    own, announced = cloud_profile(slower=2.0), cloud_profile()
    unlearned, done = served(own, announced), served(own, announced, learning=True)
    assert median(settled(unlearned)) > 0.8
    assert median(settled(done)) < 0.15
    factors = [node.factor for one in done if one.learned is not None for node in one.learned.nodes]
    assert len(factors) == len(done)
    assert min(factors) > 1.6
    assert max(factors) < 2.1


def test_right_predictions_teach_that_the_cloud_is_as_fast_as_announced() -> None:
    """However many tasks shared it."""
    one = cloud_profile()
    done = served(one, one, learning=True)
    assert median(settled(done)) < 0.15
    assert {node.factor for one in done if one.learned is not None for node in one.learned.nodes} == {1.0}
