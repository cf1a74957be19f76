"""Requests of applications in the device's process: each gets all its outputs, or one error with its cause."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from bus import messages, topics
from bus.messages import (
    Decision,
    Ended,
    HandleInput,
    Rerouted,
    SeedInput,
    SessionTerms,
    TaskCancelled,
    TaskCompleted,
    TaskState,
    TaskSubmitted,
)
from bus.tensors import Array
from bus.values import Parts
from loadgen.sim.virtual_loop import run_virtual
from stages.devices.endings import TaskEndedError
from stages.runner import ModelledRunner, PaceClock
from tests.unit.stages.devices.test_device import ALONE, AT_EDGE, PROFILE, TASK, Region, changes, region

ASKED = TASK.model_copy(update={"input": HandleInput(handle="t")})
SAMPLES = [[np.full(100, sample, np.uint8)] for sample in range(4)]


class EchoRunner(ModelledRunner):
    """Returns the inputs as outputs."""

    def station(self, plan: Any, first: int, last: int, pace: PaceClock) -> Any:
        inner = super().station(plan, first, last, pace)

        class Echo:
            waited_s = 0.0

            async def run(self, sample: int, inputs: list[Array], ready_s: float) -> list[Array]:
                await inner.run(sample, inputs, ready_s)
                return inputs

            def run_now(self, inputs: list[Array]) -> list[Array] | None:
                return None

            def close(self) -> None:
                inner.close()

        return Echo()


def written(r: Region) -> list[Any]:
    """What the device published on the topic of tasks."""
    log = r.broker.logs(topics.TASKS)[0]
    return [messages.decode(topics.TASKS, record.value) for record in log.read(0, log.end)]


def ended(state: TaskState, cause: str = "", detail: str = "") -> Ended:
    return Ended(task_id="t", attempt=1, state=state, cause=cause, detail=detail)


def test_a_request_knows_its_placement_after_a_reroute() -> None:
    async def run() -> None:
        async with region(runner=EchoRunner([PROFILE])) as r:
            request = r.device.submit(ASKED, SAMPLES)
            await r.decide(*changes(ALONE, task=ASKED))
            await asyncio.sleep(0.02)  # one of four samples
            rerouted = Rerouted(
                task_id="t",
                attempt=1,
                device="d",
                placement=AT_EDGE,
                from_s=0.5,
                samples=2,
                delay_s=0.25,
                parts=Parts(),
            )
            await r.decide(rerouted)
            await asyncio.sleep(0.01)
            assert request.placed is not None
            assert request.placed.placement == AT_EDGE
            assert request.placed.delay_s == pytest.approx(0.75)  # of the whole task

    run_virtual(run())


def test_a_request_is_submitted_and_gets_its_outputs_in_order() -> None:
    async def run() -> None:
        async with region(runner=EchoRunner([PROFILE])) as r:
            request = r.device.submit(ASKED, SAMPLES)
            await asyncio.sleep(0.1)
            assert written(r) == [ASKED]
            admitted, placed, start = changes(ALONE, task=ASKED)
            await r.decide(admitted, placed, start)
            outputs = await request.result()
            assert [int(one[0][0]) for one in outputs] == [0, 1, 2, 3]
            assert request.placed == placed
            assert request.completed is not None
            assert request.completed.measured.device_s == pytest.approx(0.08)
            assert r.shown == []  # they are the application's, not the operator's
            await asyncio.sleep(0.1)
            assert isinstance(r.events()[0], TaskCompleted)
            request.cancel()  # without effect
            await r.decide(ended(TaskState.COMPLETED))
            await asyncio.sleep(0.1)
            assert written(r) == [ASKED]
            assert len(await request.result()) == 4
            assert not r.device.tasks

    run_virtual(run())


@pytest.mark.parametrize(
    ("end", "repeatable"),
    [
        (ended(TaskState.REJECTED, "queue_full", "9 tasks wait already"), True),
        (ended(TaskState.REJECTED, "never_fits", "no edge has a slot"), False),
        (ended(TaskState.FAILED, "input_lost", "d: lease_expired"), True),
        (ended(TaskState.FAILED, "stage_error", "a broken model"), False),
        (ended(TaskState.EXPIRED, "deadline"), False),
    ],
)
def test_an_end_without_results_reaches_the_application_with_its_cause(end: Ended, repeatable: bool) -> None:
    async def run() -> None:
        async with region() as r:
            request = r.device.submit(ASKED, SAMPLES)
            await r.decide(*changes(ALONE, task=ASKED)[:1], end)
            with pytest.raises(TaskEndedError) as raised:
                await request.result()
            assert (raised.value.cause, raised.value.repeatable) == (end.cause, repeatable)
            assert end.detail in str(raised.value)
            assert not r.device.tasks

    run_virtual(run())


@pytest.mark.parametrize("before", [True, False])
def test_a_cancelled_request_cancels_its_task_after_the_submission(before: bool) -> None:
    async def run() -> None:
        async with region() as r:
            request = r.device.submit(ASKED, SAMPLES)
            if not before:
                await r.decide(*changes(AT_EDGE, task=ASKED))
                await asyncio.sleep(1.0)
            request.cancel()
            with pytest.raises(TaskEndedError) as raised:
                await request.result()
            assert (raised.value.cause, raised.value.repeatable) == ("cancelled", True)
            await asyncio.sleep(0.1)
            assert written(r) == [ASKED, TaskCancelled(task_id="t")]
            await r.decide(*(changes(AT_EDGE, task=ASKED)[:1] if before else ()), ended(TaskState.FAILED, "cancelled"))
            await asyncio.sleep(0.1)
            assert not r.device.tasks

    run_virtual(run())


def test_requests_of_a_device_that_drains_or_stops_may_be_repeated() -> None:
    async def run() -> None:
        async with region() as r:
            first = r.device.submit(ASKED, SAMPLES)
            await r.device.drain()
            late = r.device.submit(ASKED.model_copy(update={"task_id": "u"}), SAMPLES)
            for request, cause in ((first, "draining"), (late, "not_ready")):
                with pytest.raises(TaskEndedError) as raised:
                    await request.result()
                assert (raised.value.cause, raised.value.repeatable) == (cause, True)
        async with region() as r:
            running = r.device.submit(ASKED, SAMPLES)
            await r.decide(*changes(AT_EDGE, task=ASKED))
            await asyncio.sleep(1.0)
        with pytest.raises(TaskEndedError) as raised:
            await running.result()
        assert (raised.value.cause, raised.value.repeatable) == ("stopped", True)

    run_virtual(run())


@pytest.mark.parametrize(
    ("task", "samples"),
    [
        (TASK, SAMPLES),
        (ASKED, SAMPLES[:3]),
        (ASKED.model_copy(update={"device": "other"}), SAMPLES),
        (ASKED.model_copy(update={"session": SessionTerms(rate_hz=1.0)}), SAMPLES),
        (ASKED.model_copy(update={"input": SeedInput(seed=1)}), SAMPLES),
    ],
)
def test_a_task_that_does_not_fit_its_samples_is_refused_at_once(task: TaskSubmitted, samples: Any) -> None:
    async def run() -> None:
        async with region() as r:
            with pytest.raises(ValueError, match="task t"):
                r.device.submit(task, samples)
            await asyncio.sleep(0.1)
            assert written(r) == []

    run_virtual(run())


@pytest.mark.parametrize("admission_read", [True, False])
def test_a_device_that_missed_the_end_of_its_request_says_so(admission_read: bool) -> None:
    """It has read a snapshot instead of the decisions."""

    async def run() -> None:
        async with region() as r:
            request = r.device.submit(ASKED, SAMPLES)
            pending = r.device.submit(ASKED.model_copy(update={"task_id": "u"}), SAMPLES)
            admitted = changes(ALONE, task=ASKED)[:1]
            if admission_read:
                await r.decide(*admitted)
                await asyncio.sleep(0.1)
            missed = (*(() if admission_read else admitted), ended(TaskState.FAILED, "stalled"))
            r.node.fences.apply(
                Decision(region=0, epoch=1, nonce="n", seq=9, now_s=0.0, inputs={}, changes=missed, ledger_hash="h")
            )
            r.device.on_lost()
            with pytest.raises(TaskEndedError) as raised:
                await request.result()
            assert raised.value.repeatable
            assert not r.device.tasks
            assert list(r.device.clients) == ["u"]  # its admission may still come
            pending.cancel()

    run_virtual(run())
