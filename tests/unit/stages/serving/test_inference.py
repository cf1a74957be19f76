"""Requests on a device: in warm sessions, in named ones, as tasks; deadlines, refusals, statistics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bus.errors import DeeparError
from bus.messages import Ended, SessionTerms, TaskState
from bus.values import Codec, Role, Route
from loadgen.sim.virtual_loop import run_virtual
from stages.devices.endings import FrameDroppedError, SampleFailedError, UnansweredError
from stages.devices.session import Keep
from stages.serving.catalogue import ServedModel
from stages.serving.inference import MAX_NAMED, MAX_SESSION_SAMPLES, DeviceInference, InferenceOptions
from stages.serving.submission import refusal
from stages.serving.values import Fault, InferRequest, InferResponse, Mode, ModelInfo, RequestTerms, ServingError
from stages.serving.warm import IDLE_S, LOWEST_HZ, MAX_WARM, REFUSED_S, fitting_rate
from tests.unit.stages.serving.fake_device import FakeDevice, placed, rejected
from tests.unit.stages.serving.fake_inference import tensor

INFO = ModelInfo(
    name="double",
    version="1",
    sha256="0" * 64,
    inputs=(tensor("b", (1, 2)), tensor("a", (1, 3))),
    outputs=(tensor("two_a", (1, 3)), tensor("two_b", (1, 2))),
)
MODEL = ServedModel(INFO, inputs=("a", "b"), outputs=(0, 1))  # a device takes and returns `a` first


@dataclass
class World:
    """An endpoint on a fake device."""

    inference: DeviceInference
    device: FakeDevice
    is_ready: bool = True

    async def ask(self, samples: int = 1, **terms: Any) -> InferResponse:
        request = asked(samples, **terms)
        answer = await self.inference.infer(request)
        for name, (_, array) in zip(("a", "b"), answer.outputs, strict=True):
            assert array.tobytes() == (2 * request.inputs[name]).tobytes()
        return answer

    async def refused(self, samples: int = 1, **terms: Any) -> ServingError:
        with pytest.raises(ServingError) as error:
            await self.inference.infer(asked(samples, **terms))
        return error.value


def asked(samples: int = 1, **terms: Any) -> InferRequest:
    numbers = np.random.default_rng(samples)
    inputs = {
        "a": numbers.standard_normal((samples, 3)).astype(np.float32),
        "b": numbers.standard_normal((samples, 2)).astype(np.float32),
    }
    return InferRequest(model="double", inputs=inputs, id="7", client="c", terms=RequestTerms(**terms))


@contextlib.asynccontextmanager
async def endpoint(options: InferenceOptions | None = None) -> AsyncIterator[World]:
    device = FakeDevice()
    inference = DeviceInference("d", lambda: device, [MODEL], lambda: world.is_ready, options)
    world = World(inference, device)
    async with inference.serving():
        yield world


def virtually(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test in virtual time."""

    def run() -> None:
        run_virtual(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@virtually
async def test_requests_share_a_warm_session_and_get_their_outputs_by_name() -> None:
    async with endpoint() as world:
        for samples in (1, 3, MAX_SESSION_SAMPLES):
            answer = await world.ask(samples)
            assert (answer.model, answer.version, answer.id) == ("double", "1", "7")
            assert [info.name for info, _ in answer.outputs] == ["two_a", "two_b"]
            assert answer.parameters["deepar_kind"] == "device"
            assert answer.parameters["deepar_cuts"] == "2,2"
            assert answer.parameters["deepar_mode"] == "session"
            assert answer.parameters["deepar_predicted_device_s"] == 0.25
        (session,) = world.device.sessions
        assert session.submitted.session == SessionTerms(rate_hz=LOWEST_HZ)
        assert not world.device.requests
        assert world.inference.sessions == 1


@virtually
async def test_large_requests_and_those_that_ask_for_it_are_tasks() -> None:
    async with endpoint() as world:
        await world.ask(MAX_SESSION_SAMPLES + 1, timeout_s=5.0, max_link1_bps=7, priority=2)
        answer = await world.ask(mode=Mode.REQUEST)
        assert answer.parameters["deepar_mode"] == "request"
        assert answer.parameters["deepar_measured_s"] == 0.375
        assert answer.parameters["deepar_measured_device_s"] == 0.125
        assert not world.device.sessions
        first, second = (request.submitted for request in world.device.requests)
        assert (first.samples, first.deadline_s, first.max_link1_bps, first.priority) == (17, 5.0, 7, 2)
        assert second.deadline_s is None
        assert first.task_id != second.task_id
        assert world.device.cancelled == []
    async with endpoint(InferenceOptions(sessions=False)) as world:
        await world.ask()
        await world.ask(mode=Mode.SESSION)
        assert (len(world.device.requests), len(world.device.sessions)) == (1, 1)


@virtually
async def test_requests_of_other_terms_have_another_session() -> None:
    async with endpoint() as world:
        await world.ask()
        await world.ask(tiers=(Role.EDGE,))
        await world.ask(max_link1_bps=5)
        await world.ask(tiers=(Role.EDGE,))
        assert [session.submitted.tiers for session in world.device.sessions] == [None, (Role.EDGE,), None]


@virtually
async def test_the_agreement_that_a_request_demands_reaches_the_planner() -> None:
    async with endpoint() as world:
        await world.ask()
        await world.ask(min_agreement=0.995)
        await world.ask(min_agreement=0.9, mode=Mode.REQUEST)
        await world.ask(min_agreement=0.9, session="s", session_start=True)
        assert [session.submitted.min_agreement for session in world.device.sessions] == [None, 0.995, 0.9]
        assert [request.submitted.min_agreement for request in world.device.requests] == [0.9]


@pytest.mark.parametrize(
    ("codecs", "named"),
    [
        ([], None),
        ([(Codec.RAW, Codec.RAW)], None),
        ([(Codec.Q8, Codec.RAW)], "q8,raw"),
        ([(Codec.Q8, Codec.Q4), (Codec.RAW, Codec.RAW), (Codec.ZSTD, Codec.RAW)], "q8,q4 zstd,raw"),
    ],
)
def test_an_answer_names_the_codecs_of_the_links(codecs: list[tuple[Codec, Codec]], named: str | None) -> None:
    routes = tuple(
        Route(cut1=1, cut2=1, share=1 / len(codecs), codec1=codec1, codec2=codec2, stations_s=(0.0,) * 7)
        for codec1, codec2 in codecs
    )

    @virtually
    async def ask() -> None:
        async with endpoint() as world:
            await world.ask()
            (session,) = world.device.sessions
            assert session.placed is not None
            placement = session.placed.placement.model_copy(update={"routes": routes or None})
            session.place(session.placed.model_copy(update={"placement": placement}))
            answer = await world.ask()
            assert answer.parameters.get("deepar_codecs") == named

    ask()


@virtually
async def test_a_limit_of_0_keeps_a_request_off_the_link() -> None:
    async with endpoint() as world:
        await world.ask(max_link2_bps=0)
        await world.ask(max_link1_bps=0, mode=Mode.REQUEST)
        assert [session.submitted.max_link2_bps for session in world.device.sessions] == [0]
        assert [request.submitted.max_link1_bps for request in world.device.requests] == [0]


@virtually
async def test_a_gateway_computes_on_other_tiers_only() -> None:
    async with endpoint(InferenceOptions(allowed=(Role.EDGE, Role.CLOUD))) as world:
        await world.ask()
        await world.ask(tiers=(Role.DEVICE, Role.CLOUD))
        await world.ask(mode=Mode.REQUEST)
        assert (await world.refused(tiers=(Role.DEVICE,))).fault is Fault.INVALID
        assert [session.submitted.tiers for session in world.device.sessions] == [
            (Role.EDGE, Role.CLOUD),
            (Role.CLOUD,),
        ]
        assert world.device.requests[0].submitted.tiers == (Role.EDGE, Role.CLOUD)


@virtually
async def test_a_refused_session_makes_requests_tasks_for_a_while() -> None:
    async with endpoint() as world:
        world.device.refused = rejected()
        await world.ask()
        await world.ask()
        assert (len(world.device.sessions), len(world.device.requests)) == (1, 2)
        refusal = await world.refused(mode=Mode.SESSION)
        assert (refusal.fault, refusal.retry_after_s is not None) == (Fault.UNAVAILABLE, True)
        world.device.refused = None
        await asyncio.sleep(REFUSED_S + 1.0)
        await world.ask()
        assert (len(world.device.sessions), len(world.device.requests)) == (2, 2)


@virtually
async def test_a_session_is_closed_when_it_is_idle() -> None:
    async with endpoint() as world:
        await world.ask()
        (first,) = world.device.sessions
        await asyncio.sleep(IDLE_S - 2.0)
        await world.ask()
        await asyncio.sleep(IDLE_S - 2.0)
        assert world.inference.sessions == 1
        await asyncio.sleep(4.0)
        assert world.inference.sessions == 0
        with pytest.raises(UnansweredError):
            first.push([])
        world.device.complete(first)
        await world.ask()
        assert len(world.device.sessions) == 2


@virtually
async def test_a_session_follows_the_rate_of_its_requests() -> None:
    async with endpoint() as world:
        for _ in range(5 * 40):
            await world.ask()
            await asyncio.sleep(1 / 40)
        slow, fast = world.device.sessions
        assert fast.submitted.session == SessionTerms(rate_hz=fitting_rate(40.0))
        with pytest.raises(UnansweredError):
            slow.push([])  # it was closed after the other was ready
        world.device.complete(slow)
        await world.ask()
        assert fast.answered > 0
        assert world.inference.by_model["double"].failures == 0
        for _ in range(90):  # one request a second
            await world.ask()
            await asyncio.sleep(1.0)
        rates = [session.submitted.session.rate_hz for session in world.device.sessions if session.submitted.session]
        assert rates == [16.0, 64.0]  # 64 is less than 8 times the lowest
        world.device.complete(fast)


@virtually
async def test_a_request_that_meets_the_end_of_its_session_uses_the_next_one() -> None:
    async with endpoint() as world:
        await world.ask()
        (first,) = world.device.sessions
        first.drain()
        await world.ask()
        assert len(world.device.sessions) == 2
        world.device.complete(first)


@virtually
async def test_a_session_that_is_lost_tells_its_requests_that_they_may_be_repeated() -> None:
    async with endpoint() as world:
        world.device.slow = True
        asking = asyncio.create_task(world.refused())
        await asyncio.sleep(0.1)
        (session,) = world.device.sessions
        session.end(Ended(task_id="t", attempt=1, state=TaskState.FAILED, cause="no_node", detail="e1 was lost"))
        refused = await asking
        assert (refused.fault, refused.repeatable) == (Fault.UNAVAILABLE, True)
        world.device.slow = False
        await world.ask()


@virtually
async def test_requests_beside_one_that_the_model_cannot_compute_are_computed_alone() -> None:
    async with endpoint() as world:
        world.device.slow = True
        asking = [asyncio.create_task(world.ask()) for _ in range(3)]
        await asyncio.sleep(0.1)
        (session,) = world.device.sessions
        session.end(Ended(task_id="t", attempt=1, state=TaskState.FAILED, cause="stage_error", detail="bad index"))
        answers = await asyncio.gather(*asking)
        assert [answer.parameters["deepar_mode"] for answer in answers] == ["request"] * 3
        world.device.slow = False
        assert (await world.ask()).parameters["deepar_mode"] == "session"


@virtually
async def test_requests_of_a_named_session_that_ends_open_one_session_in_its_place() -> None:
    async with endpoint() as world:
        world.device.slow = True
        asking = [asyncio.create_task(world.refused(session="s", session_start=True))]
        await asyncio.sleep(0.1)
        asking += [asyncio.create_task(world.refused(session="s")) for _ in range(3)]
        await asyncio.sleep(0.1)
        (session,) = world.device.sessions
        session.end(Ended(task_id="t", attempt=1, state=TaskState.FAILED, cause="no_node", detail="e1 was lost"))
        assert all(refused.repeatable for refused in await asyncio.gather(*asking))
        assert len(world.device.sessions) == 2
        world.device.slow = False
        await world.ask(session="s")


@virtually
async def test_a_named_session_whose_requests_wait_for_its_placement_is_not_idle() -> None:
    async with endpoint() as world:
        world.device.held = True
        waiting = asyncio.create_task(world.ask(session="s", session_start=True))
        await asyncio.sleep(IDLE_S + 5.0)
        also = asyncio.create_task(world.ask(session="s"))
        await asyncio.sleep(0.1)
        (session,) = world.device.sessions
        session.place(placed(session.submitted))
        while session.waiting:
            taken = await session.take()
            assert taken is not None
            number, frame = taken
            session.answer(number, [tensor + tensor for tensor in frame.tensors])
        await asyncio.gather(waiting, also)


@virtually
async def test_warm_sessions_are_limited_and_other_terms_are_tasks() -> None:
    async with endpoint() as world:
        for number in range(1, MAX_WARM + 10):
            answer = await world.ask(max_link1_bps=number)
            assert answer.parameters["deepar_mode"] == ("session" if number <= MAX_WARM else "request")
        assert (await world.refused(max_link1_bps=1_000, mode=Mode.SESSION)).fault is Fault.UNAVAILABLE
        assert world.inference.sessions == MAX_WARM


@virtually
async def test_a_deadline_ends_a_request_and_its_task() -> None:
    async with endpoint(InferenceOptions(timeout_s=9.0)) as world:
        world.device.slow = world.device.held = True
        clock = asyncio.get_running_loop().time
        for terms, limit_s in (({"timeout_s": 0.5}, 0.5), ({}, 9.0), ({"timeout_s": 0.25, "mode": Mode.REQUEST}, 0.25)):
            began_s = clock()
            assert (await world.refused(**terms)).fault is Fault.DEADLINE
            assert clock() - began_s == pytest.approx(limit_s)
        assert world.device.cancelled == [world.device.requests[0].submitted.task_id]
        statistics = world.inference.by_model["double"]
        assert (statistics.failures, statistics.pending) == (3, 0)


@virtually
async def test_a_client_that_goes_away_cancels_its_task() -> None:
    async with endpoint() as world:
        world.device.held = True
        asking = asyncio.create_task(world.ask(mode=Mode.REQUEST))
        await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.wait([asking])
        assert world.device.cancelled == [world.device.requests[0].submitted.task_id]
        statistics = world.inference.by_model["double"]
        assert (statistics.cancelled, statistics.failures, statistics.pending) == (1, 0, 0)


@virtually
async def test_a_named_session_lasts_from_its_start_to_its_end() -> None:
    async with endpoint() as world:
        assert "sequence_start" in str(await world.refused(session="s"))
        await world.ask(session="s", session_start=True, rate_hz=25.0, latency_s=0.5)
        await world.ask(session="s")
        await world.ask(session="s", session_end=True)
        (session,) = world.device.sessions
        assert session.submitted.session == SessionTerms(rate_hz=25.0, latency_s=0.5)
        assert session.answered == 3
        assert (await world.refused(session="s")).fault is Fault.INVALID
        await asyncio.sleep(0)
        with pytest.raises(UnansweredError):
            session.push([])
        world.device.complete(session)


@virtually
async def test_named_sessions_are_limited_and_close_when_idle() -> None:
    async with endpoint() as world:
        for number in range(MAX_NAMED):
            await world.ask(session=str(number), session_start=True)
        assert (await world.refused(session="more", session_start=True)).fault is Fault.BUSY
        await asyncio.sleep(IDLE_S + 2.0)
        assert world.inference.sessions == 0
        for session in world.device.sessions:
            world.device.complete(session)
        await world.ask(session="more", session_start=True)


@virtually
async def test_a_stream_has_a_session_of_its_own() -> None:
    async with endpoint() as world:
        async with world.inference.stream("double", "", RequestTerms(rate_hz=50.0), Keep.LATEST) as stream:
            await stream.infer(asked())
            (session,) = world.device.sessions
            assert (session.keep, session.submitted.session) == (Keep.LATEST, SessionTerms(rate_hz=50.0))
            assert world.inference.sessions == 1
        assert world.inference.sessions == 0
        world.device.complete(session)
        world.device.refused = rejected(cause="queue_full")
        with pytest.raises(ServingError) as refused:
            async with world.inference.stream("double", "", RequestTerms(), Keep.ALL):
                pass
        assert refused.value.fault is Fault.BUSY


@virtually
async def test_a_stream_whose_session_ends_goes_on_in_another() -> None:
    async with endpoint() as world:
        async with world.inference.stream("double", "", RequestTerms(), Keep.ALL) as stream:
            world.device.slow = True
            (first,) = world.device.sessions
            first.serve(lambda tensors: None)
            asking = [asyncio.create_task(stream.infer(asked())) for _ in range(3)]
            await asyncio.sleep(0.1)
            first.end(Ended(task_id="t", attempt=1, state=TaskState.FAILED, cause="no_node", detail="e1 was lost"))
            assert all(isinstance(one, ServingError) for one in await asyncio.gather(*asking, return_exceptions=True))
            world.device.slow = False
            await stream.infer(asked())
            await stream.infer(asked())
            assert len(world.device.sessions) == 2
            second = world.device.sessions[1]
            second.end(Ended(task_id="t", attempt=1, state=TaskState.FAILED, cause="no_node"))
            world.device.refused = rejected()
            for _ in range(3):  # the planner is asked once, not for each frame
                with pytest.raises(ServingError):
                    await stream.infer(asked())
            assert len(world.device.sessions) == 3
            world.device.refused = None
            await asyncio.sleep(REFUSED_S)
            await stream.infer(asked())
            assert len(world.device.sessions) == 4
        world.device.complete(world.device.sessions[-1])


@virtually
async def test_a_stream_without_frames_gives_back_what_its_session_holds() -> None:
    async with endpoint() as world:
        async with world.inference.stream("double", "", RequestTerms(), Keep.ALL) as stream:
            await stream.infer(asked())
            await asyncio.sleep(IDLE_S + 2.0)
            (first,) = world.device.sessions
            with pytest.raises(UnansweredError):
                first.push([])
            world.device.complete(first)
            assert world.inference.sessions == 0
            await stream.infer(asked())
            assert (len(world.device.sessions), world.inference.sessions) == (2, 1)
        world.device.complete(world.device.sessions[-1])


@virtually
async def test_a_frame_of_several_samples_needs_a_stream_that_keeps_all() -> None:
    async with endpoint() as world:
        for keep in Keep:
            async with world.inference.stream("double", "", RequestTerms(), keep) as stream:
                if keep is Keep.ALL:
                    await stream.infer(asked(3))
                else:
                    with pytest.raises(ServingError, match="3 samples") as refused:
                        await stream.infer(asked(3))
                    assert refused.value.fault is Fault.INVALID
            world.device.complete(world.device.sessions[-1])


@virtually
async def test_no_request_is_accepted_before_the_device_is_ready_and_while_it_drains() -> None:
    async with endpoint() as world:
        world.is_ready = False
        assert not world.inference.ready()
        assert (await world.refused()).fault is Fault.UNAVAILABLE
        world.is_ready = True
        await world.ask()
        world.inference.drain()
        assert not world.inference.ready()
        refused = await world.refused()
        assert (refused.fault, refused.repeatable, "drains" in str(refused)) == (Fault.UNAVAILABLE, True, True)


GIVEN: dict[str, Any] = dict(asked().inputs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "triple"}, "no model 'triple'"),
        ({"version": "2"}, "no version '2'"),
        ({"inputs": {"a": np.zeros((1, 3), np.float32)}}, "input 'b' is missing"),
        ({"inputs": GIVEN | {"z": np.zeros(1)}}, "no input 'z'"),
        ({"inputs": GIVEN | {"a": np.zeros((1, 3))}}, "input 'a': FP32"),
        ({"inputs": GIVEN | {"a": np.zeros((1, 4), np.float32)}}, r"shape \[-1, 3\] expected"),
        ({"inputs": GIVEN | {"a": np.zeros((2, 3), np.float32)}}, "number of samples"),
        ({"inputs": asked(1_025).inputs}, "at most 1,024"),
        ({"outputs": ("two_a", "two_c")}, "no output 'two_c'"),
    ],
)
def test_a_request_that_does_not_fit_the_model_is_refused(change: dict[str, Any], words: str) -> None:
    async def run() -> None:
        async with endpoint() as world:
            given = {"model": "double", "inputs": asked().inputs} | change
            with pytest.raises(ServingError, match=words):
                await world.inference.infer(InferRequest(**given))
            assert not world.device.sessions

    run_virtual(run())


@virtually
async def test_outputs_come_in_the_order_of_the_request() -> None:
    async with endpoint() as world:
        request = InferRequest(model="double", inputs=asked(2).inputs, outputs=("two_b", "two_a"))
        answer = await world.inference.infer(request)
        assert [(info.name, array.shape) for info, array in answer.outputs] == [("two_b", (2, 2)), ("two_a", (2, 3))]


@virtually
async def test_statistics_count_requests_samples_and_times() -> None:
    async with endpoint() as world:
        await world.ask(3)
        await world.ask(2, mode=Mode.REQUEST)
        await world.refused(session="none")
        (report,) = world.inference.statistics("double")
        assert (report["inference_count"], report["execution_count"]) == (5, 2)
        assert report["inference_stats"]["success"]["count"] == 2
        assert report["inference_stats"]["fail"]["count"] == 1
        assert world.inference.by_model["double"].tasks == 1


@pytest.mark.parametrize(
    ("error", "fault", "repeatable"),
    [
        (UnansweredError("queue_full", repeatable=True), Fault.BUSY, True),
        (FrameDroppedError("dropped", repeatable=True), Fault.BUSY, True),
        (UnansweredError("deadline", repeatable=False), Fault.DEADLINE, False),
        (UnansweredError("never_fits", repeatable=False), Fault.INVALID, False),
        (SampleFailedError("stage_error", repeatable=False), Fault.INTERNAL, False),
        (UnansweredError("unheard_of", repeatable=False), Fault.INTERNAL, False),
        (UnansweredError("input_lost", repeatable=True), Fault.UNAVAILABLE, True),
    ],
)
def test_an_end_without_an_answer_says_whether_it_may_be_repeated(
    error: UnansweredError, fault: Fault, repeatable: bool
) -> None:
    found: DeeparError = refusal(error)
    assert isinstance(found, ServingError)
    assert (found.fault, found.repeatable) == (fault, repeatable)
