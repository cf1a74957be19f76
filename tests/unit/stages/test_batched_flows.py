"""Flows of an edge that computes samples in batches: of several tasks, and of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

import pytest

from bus import messages, topics
from bus.frames import decode_frame
from bus.messages import TaskFailed
from bus.tensors import Activations, Array
from bus.values import BatchSpeed
from loadgen.sim.virtual_loop import run_virtual
from stages.batches import Batcher
from stages.computing import Computing
from stages.hops import flow
from stages.runner import MOST_AT_ONCE, ModelledRunner, ModelledSample

from .test_hop import PROFILE, Edge, edge, frame, plan

BATCH = 8
BATCHED = PROFILE.model_copy(
    update={"batch": (BatchSpeed(batch=BATCH, factors=(0.25, 0.25)),), "layer_s": (0.5, 0.5)}
)  # a sample alone takes 1 s, eight together 2 s
TASKS = [f"t{number}" for number in range(BATCH)]
POISON = "t3"


class WatchedRunner(ModelledRunner):
    """Records its batches; samples of one task may fail."""

    def __init__(self, poison: str | None = None, executors: int | None = None) -> None:
        super().__init__([BATCHED.model_copy(update={"executors": executors})], self._batcher)
        self.sizes: list[int] = []
        self._poison = poison

    def _batcher(self, *args: object, **more: object) -> Batcher[ModelledSample, list[Array]]:
        return Batcher(*args, **more, on_batch=self.sizes.append)  # type: ignore[arg-type]

    def compute(self, one: ModelledSample) -> list[Array]:
        if one.plan.task_id == self._poison:
            raise ValueError("bad sample")
        return super().compute(one)


async def play(e: Edge, tasks: Sequence[str], samples: int) -> None:
    """Give all samples of all tasks at once."""
    for sample in range(samples):
        for task_id in tasks:
            made = plan(task_id, samples=samples, todo=samples) if sample == 0 else None
            await e.give(frame(sample, task_id=task_id, with_plan=made), key=task_id)


def results(e: Edge) -> dict[str, list[int]]:
    """The samples of each task in the order of their results."""
    found: dict[str, list[int]] = {}
    for _, value, _ in e.read(topics.RESULTS):
        one = decode_frame(value)
        if one.kind == "result":
            found.setdefault(one.task_id, []).extend(piece.sample for piece in one.pieces)
    return found


def reported(e: Edge, key: str = "edge_s") -> dict[str, float]:
    """What the edge reports of each task: its busy time, or its number of batches."""
    frames = [decode_frame(value) for _, value, _ in e.read(topics.RESULTS)]
    return {one.task_id: one.report[key] for one in frames if one.kind == "report" and key in one.report}


def test_samples_of_several_tasks_are_computed_together() -> None:
    async def run() -> None:
        runner = WatchedRunner()
        async with edge(runner=runner, slots=len(TASKS)) as e:
            await play(e, TASKS, 3)
            await asyncio.sleep(7.5)
            assert results(e) == {task_id: [0, 1, 2] for task_id in TASKS}  # one by one they would take 24 s
            assert sum(runner.sizes) == 3 * len(TASKS)
            assert max(runner.sizes) >= BATCH
            assert sum(reported(e).values()) == pytest.approx(6.0)  # the tasks share the machine's time
            assert sum(reported(e, "edge_batches").values()) == pytest.approx(len(runner.sizes))
            assert e.committed() == 3 * len(TASKS)

    run_virtual(run())


def test_samples_of_one_task_are_computed_together_and_stay_in_order() -> None:
    async def run() -> None:
        runner = WatchedRunner()
        samples = 2 * MOST_AT_ONCE + 1
        async with edge(runner=runner) as e:
            await play(e, ["t"], samples)
            await asyncio.sleep(6.0)
            assert results(e) == {"t": list(range(samples))}
            assert runner.sizes == [MOST_AT_ONCE, MOST_AT_ONCE, 1]
            assert reported(e)["t"] == pytest.approx(2 * 2.0 + 1.0)
            assert reported(e, "edge_batches")["t"] == pytest.approx(3.0)

    run_virtual(run())


def test_a_bad_sample_of_a_batch_fails_its_own_task_only() -> None:
    async def run() -> None:
        runner = WatchedRunner(POISON)
        async with edge(runner=runner, slots=len(TASKS)) as e:
            await play(e, TASKS, 2)
            await asyncio.sleep(30.0)
            assert results(e) == {task_id: [0, 1] for task_id in TASKS if task_id != POISON}
            events = [messages.decode(topics.EVENTS, value) for _, value, _ in e.read(topics.EVENTS)]
            assert {event.task_id for event in events if isinstance(event, TaskFailed)} == {POISON}
            assert e.committed() == 2 * len(TASKS)

    run_virtual(run())


def test_busy_times_are_shares_of_batches_on_several_executors_too() -> None:
    async def run() -> None:
        runner = WatchedRunner(executors=2)
        async with edge(runner=runner) as e:
            await play(e, ["t"], MOST_AT_ONCE)
            await asyncio.sleep(4.0)
            assert runner.sizes == [MOST_AT_ONCE // 2] * 2
            assert reported(e)["t"] == pytest.approx(2 * BATCHED.together_s(MOST_AT_ONCE // 2, 0, 2))
            assert reported(e, "edge_batches")["t"] == pytest.approx(2.0)

    run_virtual(run())


def test_a_sample_counts_as_busy_time_when_it_is_done() -> None:
    """A report may be sent while later samples of the group are still computed."""

    class Watched(Computing):
        seen: ClassVar[list[tuple[float, float]]] = []

        async def run_together(self, *args: Any) -> AsyncGenerator[tuple[Activations, float]]:
            async for found in super().run_together(*args):
                self.seen.append((self.busy_s, self.batches))
                yield found

    async def run() -> None:
        async with edge(runner=WatchedRunner()) as e:
            await play(e, ["t"], 3)
            await asyncio.sleep(5.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "Computing", Watched)
        run_virtual(run())
    third = BATCHED.together_s(3, 0, 2) / 3
    assert [busy_s for busy_s, _ in Watched.seen] == pytest.approx([third, 2 * third, 3 * third])
    assert [batches for _, batches in Watched.seen] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_a_profile_without_batches_computes_tasks_side_by_side() -> None:
    async def run() -> None:
        runner = ModelledRunner([BATCHED.without_batches()])
        async with edge(runner=runner, slots=len(TASKS)) as e:
            await play(e, TASKS, 2)
            await asyncio.sleep(2.5)
            assert results(e) == {task_id: [0, 1] for task_id in TASKS}
            assert reported(e, "edge_batches") == {}

    run_virtual(run())
