"""Sessions: each pushed frame has its answer or one error, whatever happens to the stages in between."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bus import messages, topics
from bus.messages import (
    Admitted,
    Ended,
    NodeLost,
    Retried,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskState,
)
from bus.tensors import Array
from bus.values import Placement
from loadgen.sim.virtual_loop import run_virtual
from stages.components import StageComponents
from stages.devices.device import STALL_S
from stages.devices.endings import FrameDroppedError, SampleFailedError, SessionEndedError
from stages.devices.session import MAX_WAITING, Keep
from stages.hops.hop import OTHER_REGION_S
from stages.network.frame_sender import PLAN_EVERY_S
from stages.window import Window
from tests.numbered_frames import NumberingRunner, answers, broken_frame, frame
from tests.unit.stages.scripted_region import (
    ALONE,
    AT_EDGE,
    EVERYWHERE,
    PROFILE,
    SESSION,
    ScriptedRegion,
    placed_and_started,
    scripted_region,
)

PLACEMENTS = pytest.mark.parametrize(
    "placement", [ALONE, AT_EDGE, EVERYWHERE], ids=["device", "device+edge", "device+edge+cloud"]
)


async def pushed(session: Any, numbers: range, gap_s: float) -> list[asyncio.Future[list[Array]]]:
    """Push frames at a constant rate."""
    found = []
    for number in numbers:
        found.append(session.push(frame(number)))
        await asyncio.sleep(gap_s)
    return found


async def all_answered(futures: list[asyncio.Future[list[Array]]], numbers: range) -> bool:
    outputs = await asyncio.gather(*futures)
    return all(answers(number, one) for number, one in zip(numbers, outputs, strict=True))


@PLACEMENTS
def test_every_frame_has_its_own_answer_and_the_close_reports_means_per_frame(placement: Placement) -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(placement)
            assert await all_answered(await pushed(session, range(200), 0.033), range(200))
            assert (session.answered, session.waiting, session.under_way) == (200, 0, 0)
            completed = await r.close(session)
            parts = completed.measured
            layers = {
                "device_s": placement.cut1,
                "edge_s": placement.cut2 - placement.cut1,
                "cloud_s": 3 - placement.cut2,
            }
            for part, count in layers.items():
                assert getattr(parts, part) == pytest.approx(0.01 * count, rel=0.01), part
            assert 0.03 <= completed.delay_s < 0.05
            assert (parts.link1_s > 0) is (placement.edge is not None)
            assert (parts.link2_s > 0) is placement.uses_cloud
            assert not r.device.tasks
            assert all(not r.hop(name).flows for name in ("e", "c1", "c2"))
            with pytest.raises(SessionEndedError):
                session.push(frame(0))

    run_virtual(run())


@PLACEMENTS
def test_frames_that_are_pushed_before_the_placement_and_before_the_close_are_answered(placement: Placement) -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = r.device.open_session(SESSION)
            futures = [session.push(frame(number)) for number in range(20)]
            assert session.waiting == 20
            closing = asyncio.create_task(session.close())
            await asyncio.sleep(0.1)
            await r.decide(Admitted(task=SESSION), *placed_and_started(placement))
            assert await all_answered(futures, range(20))
            await closing
            await asyncio.sleep(0.1)
            assert [type(event) for event in r.events()] == [TaskCompleted]

    run_virtual(run())


def test_a_short_session_knows_what_the_other_stages_measured() -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(EVERYWHERE)
            assert answers(7, await session.push(frame(7)))
            parts = (await r.close(session)).measured
            assert parts.edge_s == pytest.approx(0.01)
            assert parts.cloud_s == pytest.approx(0.01)

    run_virtual(run())


def test_a_new_attempt_repeats_only_frames_without_an_answer_and_drops_late_answers() -> None:
    async def run() -> None:
        async with scripted_region(edges=("e", "f")) as r:
            session = await r.open(EVERYWHERE)
            before = await pushed(session, range(100), 0.02)
            await r.kill("e")
            lost = await pushed(session, range(100, 110), 0.02)
            await r.decide(Retried(task_id="s", attempt=2, cause="node_lost"))
            waiting = await pushed(session, range(110, 120), 0.02)
            assert session.under_way == 0
            answered = sum(future.done() for future in before)
            sent = session.waiting
            assert answered >= 95
            assert answered + sent == 120
            await r.decide(*placed_and_started(EVERYWHERE.model_copy(update={"edge": "f"}), 2))
            after = await pushed(session, range(120, 140), 0.02)
            assert await all_answered(before + lost + waiting + after, range(140))
            repeated = r.frames(topics.activations_topic("f"))
            samples = {piece.sample for one in repeated for piece in one.pieces}
            assert samples == set(range(sent + 20))  # numbered anew, without gaps
            await r.close(session)

    run_virtual(run())


def test_an_answer_of_an_old_attempt_is_not_taken_for_that_of_another_frame() -> None:
    """Both attempts number their frames from 0."""

    async def run() -> None:
        async with scripted_region(edges=("e", "f")) as r:
            session = await r.open(AT_EDGE)
            assert await all_answered(await pushed(session, range(5), 0.05), range(5))
            old = [record for log in r.broker.logs(topics.RESULTS) for record in log.read(0, log.end)]
            await r.kill("f")  # there will be no answers of its own
            await r.move(AT_EDGE.model_copy(update={"edge": "f"}), 2)
            future = session.push(frame(5))
            await asyncio.sleep(0.1)
            for record in old:
                await r.device.node.bus.send(record.topic, record.value, key=record.key, partition=record.partition)
            await asyncio.sleep(0.1)
            assert not future.done()
            await r.move(AT_EDGE, 3)
            assert answers(5, await future)

    run_virtual(run())


def test_silence_is_a_stall_only_while_frames_are_under_way() -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(AT_EDGE)
            assert answers(0, await session.push(frame(0)))
            await asyncio.sleep(20 * STALL_S)
            assert r.events() == []
            assert answers(1, await session.push(frame(1)))  # the flow is still there, or is made again
            await r.kill("e")
            lost = session.push(frame(2))
            await asyncio.sleep(2 * STALL_S)
            (failed,) = r.events()
            assert isinstance(failed, TaskFailed)
            assert (failed.cause, failed.retryable) == ("stalled", True)
            assert not lost.done()
            await r.move(ALONE, 2, "stalled")
            assert answers(2, await lost)

    run_virtual(run())


@pytest.mark.parametrize("keep", list(Keep))
def test_frames_faster_than_the_stages_wait_or_are_replaced_and_are_counted(keep: Keep) -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(ALONE, keep)
            futures = await pushed(session, range(300), 0.001)  # the device takes 30 ms each
            await asyncio.sleep(10.0)
            outcomes = [future.exception() for future in futures]
            dropped = [number for number, error in enumerate(outcomes) if error is not None]
            if keep is Keep.ALL:
                assert dropped == []
            else:
                assert 280 <= len(dropped) < 295
                assert 299 not in dropped
                assert all(isinstance(error, FrameDroppedError) for error in outcomes if error is not None)
            assert session.dropped == len(dropped)
            assert session.answered == 300 - len(dropped)
            counters = r.device.node.status.counters
            assert counters["frames_answered"] == session.answered
            assert counters.get("frames_dropped", 0) == session.dropped
            assert all(answers(number, futures[number].result()) for number in range(300) if number not in dropped)
            await r.close(session)

    run_virtual(run())


def test_latest_keeps_few_frames_in_the_pipeline() -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(EVERYWHERE, Keep.LATEST)
            futures = await pushed(session, range(500), 0.004)
            assert session.under_way <= 5
            await asyncio.sleep(1.0)
            assert answers(499, futures[-1].result())
            assert session.answered >= 150  # the stages are busy all the time
            await r.close(session)

    run_virtual(run())


def test_a_queue_of_all_frames_is_bounded() -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = r.device.open_session(SESSION)
            futures = [session.push(frame(number)) for number in range(MAX_WAITING + 3)]
            assert [future.done() for future in futures[-4:]] == [False, True, True, True]
            with pytest.raises(FrameDroppedError) as raised:
                await futures[-1]
            assert (raised.value.cause, raised.value.repeatable, session.dropped) == ("dropped", True, 3)
            session.cancel()
            assert all(isinstance(future.exception(), SessionEndedError) for future in futures[:-3])

    run_virtual(run())


@PLACEMENTS
@pytest.mark.parametrize(("state", "cause"), [(TaskState.FAILED, "input_lost"), (TaskState.REJECTED, "never_fits")])
def test_the_end_of_a_session_reaches_every_frame_without_an_answer(
    placement: Placement, state: TaskState, cause: str
) -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(placement)
            futures = [session.push(frame(number)) for number in range(50)]
            await asyncio.sleep(0.3)
            await r.decide(Ended(task_id="s", attempt=1, state=state, cause=cause, detail="because"))
            answered = [future for future in futures if future.exception() is None]
            errors = [future.exception() for future in futures if future.exception() is not None]
            assert 0 < len(answered) < 50
            assert {(error.cause, error.repeatable) for error in errors if isinstance(error, SessionEndedError)} == {
                (cause, cause == "input_lost")
            }
            assert len(errors) + len(answered) == 50
            with pytest.raises(SessionEndedError):
                await session.ready()
            await session.close()
            with pytest.raises(SessionEndedError):
                session.push(frame(0))
            await asyncio.sleep(1.0)
            assert r.events() == []
            assert not r.device.tasks
            assert all(hop.held_bytes == hop.open_records == 0 for hop in map(r.hop, ("e", "c1", "c2")))

    run_virtual(run())


def test_a_cancelled_session_cancels_its_task_and_a_cancelled_frame_is_not_computed() -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(ALONE)
            futures = [session.push(frame(number)) for number in range(10)]
            for future in futures[5:]:
                future.cancel()
            await asyncio.sleep(1.0)
            assert session.answered == 5
            late = session.push(frame(10))
            session.cancel()
            assert isinstance(late.exception(), SessionEndedError)
            await asyncio.sleep(0.1)
            assert r.device.idle()
            assert r.events() == []
            assert cancellations(r) == ["s"]

    run_virtual(run())


@PLACEMENTS
def test_a_frame_that_the_device_cannot_compute_fails_alone(placement: Placement) -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(placement)
            found: list[tuple[int, asyncio.Future[list[Array]]]] = []
            broken = []
            for number in range(30):
                found.append((number, session.push(frame(number))))
                broken.append(session.push(broken_frame()))
            for number, future in found:
                assert answers(number, await future)
            for one in broken:
                assert isinstance(await failure(one), SampleFailedError)
            await asyncio.sleep(1.0)
            if placement.edge is not None:
                (flow,) = r.hop("e").flows.values()
                assert (flow.finished.ranges, len(flow.finished)) == (1, 30)
            await r.close(session)
            assert [type(event) for event in r.events()] == [TaskCompleted]

    run_virtual(run())


async def failure(answer: asyncio.Future[list[Array]]) -> BaseException | None:
    await asyncio.wait([answer])
    return answer.exception()


def test_frames_that_were_cancelled_before_the_placement_are_freed() -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = r.device.open_session(SESSION)
            for _ in range(3):
                futures = [session.push(frame(number)) for number in range(MAX_WAITING)]
                assert session.waiting == MAX_WAITING
                for future in futures:
                    future.cancel()
                await asyncio.sleep(0)
                assert session.waiting == 0
            last = session.push(frame(5))
            await r.decide(Admitted(task=SESSION), *placed_and_started(ALONE))
            assert answers(5, await last)

    run_virtual(run())


def cancellations(r: ScriptedRegion) -> list[str]:
    log = r.broker.logs(topics.TASKS)[0]
    found = [messages.decode(topics.TASKS, record.value) for record in log.read(0, log.end)]
    return [one.task_id for one in found if isinstance(one, TaskCancelled)]


def test_a_session_that_was_never_used_is_cancelled_by_its_close() -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = r.device.open_session(SESSION)
            await session.close()
            await asyncio.sleep(0.1)
            assert cancellations(r) == ["s"]

    run_virtual(run())


@PLACEMENTS
def test_a_device_that_drains_answers_what_was_pushed_and_takes_no_more(placement: Placement) -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(placement)
            futures = [session.push(frame(number)) for number in range(20)]
            draining = asyncio.create_task(r.device.drain())
            await asyncio.sleep(0.0)
            with pytest.raises(SessionEndedError) as raised:
                session.push(frame(20))
            assert raised.value.repeatable
            await draining
            assert await all_answered(futures, range(20))
            assert [type(event) for event in r.events()] == [TaskCompleted]
            with pytest.raises(SessionEndedError):
                r.device.open_session(SESSION.model_copy(update={"task_id": "u"})).push(frame(0))

    run_virtual(run())


def test_a_device_that_was_declared_lost_loses_the_session() -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(AT_EDGE)
            future = session.push(frame(0))
            lost = NodeLost(node="d", incarnation=r.device.node.incarnation, cause="lease_expired")
            await r.decide(lost, Ended(task_id="s", attempt=1, state=TaskState.FAILED, cause="input_lost"))
            error = future.exception()
            assert isinstance(error, SessionEndedError)
            assert (error.cause, error.repeatable) == ("input_lost", True)

    run_virtual(run())


def test_a_cloud_stage_that_takes_over_in_the_middle_loses_nothing_and_sets_stay_small() -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(EVERYWHERE)
            assert await all_answered(await pushed(session, range(200), 0.02), range(200))
            (serving,) = [name for name in ("c1", "c2") if r.hop(name).flows]
            futures = await pushed(session, range(200, 250), 0.02)
            await r.kill(serving)
            futures += await pushed(session, range(250, 400), 0.02)
            assert await all_answered(futures, range(200, 400))
            (other,) = [name for name in ("c1", "c2") if name != serving]
            (flow,) = r.hop(other).flows.values()
            assert flow.finished.ranges == 1
            await r.close(session)

    run_virtual(run())


def test_memory_stays_bounded_over_20_000_frames() -> None:
    async def run() -> None:
        quick = PROFILE.model_copy(update={"layer_s": (1e-6,) * 3})
        async with scripted_region(runner=NumberingRunner([quick])) as r:
            session = await r.open(EVERYWHERE)
            for burst in range(20_000 // 1000):
                numbers = range(1000 * burst, 1000 * burst + 1000)
                assert await all_answered([session.push(frame(number)) for number in numbers], numbers)
                flows = [flow for name in ("e", "c1", "c2") for flow in r.hop(name).flows.values()]
                assert {flow.finished.ranges for flow in flows} == {1}
                await asyncio.sleep(0.1)
                assert [flow.held_bytes for flow in flows] == [0, 0]
                assert sum(hop.open_records for hop in hops(r)) == 0
            assert session.answered == 20_000
            (known,) = r.device.tasks.values()
            assert known.results == set()
            await r.close(session)

    run_virtual(run())


class CountedWindow(Window):
    """Counts its places."""

    places = 0

    def wake(self) -> None:
        CountedWindow.places += 1
        super().wake()

    async def take(self) -> float:
        ready_s = await super().take()
        CountedWindow.places -= 1
        return ready_s


@PLACEMENTS
def test_a_window_has_no_more_places_after_many_frames_than_at_first(placement: Placement) -> None:
    async def run() -> None:
        CountedWindow.places = 0
        async with scripted_region(components=StageComponents(window=CountedWindow)) as r:
            session = await r.open(placement)
            (known,) = r.device.tasks.values()
            assert known.attempt is not None
            for burst in range(20):
                numbers = range(50 * burst, 50 * burst + 50)
                assert await all_answered([session.push(frame(number)) for number in numbers], numbers)
                assert CountedWindow.places <= known.attempt.window
            await r.close(session)

    run_virtual(run())


def hops(r: ScriptedRegion) -> list[Any]:
    return [r.hop(name) for name in ("e", "c1", "c2")]


def test_a_plan_is_repeated_for_stages_that_have_forgotten_it() -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(EVERYWHERE)
            futures = await pushed(session, range(100), PLAN_EVERY_S / 20)
            for topic in (topics.activations_topic("e"), topics.ACTIVATIONS_CLOUD):
                plans = [one.plan for one in r.frames(topic) if one.plan is not None]
                assert 4 <= len(plans) <= 7
                assert all(plan.session for plan in plans)
            assert await all_answered(futures, range(100))
            await r.close(session)

    run_virtual(run())


def test_a_session_that_an_earlier_process_opened_fails_as_lost() -> None:
    """Its submission may reach the planner after the process has ended."""

    async def run() -> None:
        async with scripted_region() as r:
            await r.decide(Admitted(task=SESSION), *placed_and_started(ALONE))
            (failed,) = r.events()
            assert isinstance(failed, TaskFailed)
            assert (failed.cause, failed.retryable) == ("input_lost", False)

    run_virtual(run())


def test_a_cloud_stage_of_another_region_serves_after_long_silence_and_after_a_takeover() -> None:
    """It does not read the decisions of the session's region, so it drops idle flows and needs the plan again."""

    async def run() -> None:
        async with scripted_region(cloud_region=1) as r:
            session = await r.open(EVERYWHERE)
            assert answers(0, await session.push(frame(0)))
            (serving,) = [name for name in ("c1", "c2") if r.hop(name).flows]
            await asyncio.sleep(2 * OTHER_REGION_S)
            assert not r.hop(serving).flows
            assert answers(1, await session.push(frame(1)))
            await r.kill(serving)
            assert await all_answered(await pushed(session, range(2, 1000), 0.02), range(2, 1000))
            assert [event for event in r.events() if isinstance(event, TaskFailed)] == []
            await r.close(session)

    run_virtual(run())


@pytest.mark.parametrize("topic", [topics.activations_topic("e"), topics.ACTIVATIONS_CLOUD])
def test_an_unreadable_record_ends_an_attempt_and_not_the_session(topic: str) -> None:
    async def run() -> None:
        async with scripted_region() as r:
            session = await r.open(EVERYWHERE)
            futures = await pushed(session, range(10), 0.02)
            await r.device.node.bus.send(topic, b"\xc1 garbage", key="s")
            futures += await pushed(session, range(10, 20), 0.02)
            (failed,) = r.events()
            assert isinstance(failed, TaskFailed)
            assert (failed.cause, failed.retryable) == ("undecodable", True)
            await r.move(EVERYWHERE, 2, "undecodable")
            assert await all_answered(futures, range(20))
            await r.close(session)

    run_virtual(run())
