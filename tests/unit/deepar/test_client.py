"""The Python client against the real HTTP endpoint on a fake inference."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import pytest
from aiohttp import web

import deepar
from bus.tensors import Array
from deploy.kafka_local.ports import free_port
from stages.devices.session import Keep
from stages.serving.limits import ServingLimits
from stages.serving.values import Fault, InferRequest, ServingError
from tests.unit.stages.serving.fake_inference import FakeInference, doubled, tensor
from tests.unit.stages.serving.http.client import rest_server

X = np.array([[1.5, -2.0, 3.25, 0.1]], np.float32)
TOKEN = "a-token-of-the-tests"


@contextlib.asynccontextmanager
async def serving(
    fake: FakeInference, *, tokens: tuple[str, ...] = (), token: str | None = None, limits: ServingLimits | None = None
) -> AsyncIterator[deepar.AsyncClient]:
    """A client of a server on `fake`."""
    async with (
        rest_server(fake, tokens=tokens, limits=limits) as server,
        deepar.AsyncClient(f"http://127.0.0.1:{server.port}", token=token, timeout_s=20.0) as client,
    ):
        yield client


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not met():
            await asyncio.sleep(0)


# --- plain requests --------------------------------------------------------------------------------------------------


async def test_the_answer_has_the_outputs_and_how_they_were_computed() -> None:
    fake = FakeInference()
    async with serving(fake) as client:
        assert await client.ready()
        assert await client.models() == ["double"]
        answer = await client.infer("double", X, priority=1, placement="device+edge", timeout_s=2.5)
    assert answer["y"].tobytes() == answer.array.tobytes() == (X + X).tobytes()
    assert (answer.model, answer.parameters["deepar_kind"]) == ("double", "device")
    (request,) = fake.requests
    assert (request.terms.priority, request.terms.timeout_s, request.id) == (1, 2.5, "1")
    assert request.terms.tiers == ("device", "edge")


async def test_a_batch_and_a_list_of_numbers() -> None:
    batch = np.arange(400, dtype=np.float32).reshape(100, 4)
    async with serving(FakeInference()) as client:
        assert np.array_equal((await client.infer("double", batch)).array, batch * 2)
        assert (await client.infer("double", [1, 2, 3, 4])).array.tolist() == [[2, 4, 6, 8]]


async def test_two_inputs_by_order_and_by_name_and_a_wanted_output() -> None:
    fake = FakeInference((tensor("xa", (1, 4)), tensor("xb", (1, 2), "int32")))
    numbers = np.array([[1, 2]], np.int32)
    async with serving(fake) as client:
        by_order = await client.infer("double", (X, numbers))
        by_name = await client.infer("double", {"xb": numbers, "xa": X}, outputs=("yb",))
        with pytest.raises(ValueError, match="outputs ya, yb"):
            _ = by_order.array
    assert by_order["ya"].tobytes() == (X + X).tobytes()
    assert by_order["yb"].tolist() == [[2, 4]]
    assert list(by_name.outputs) == ["yb"]


async def test_a_wrong_input_is_not_sent() -> None:
    fake = FakeInference()
    async with serving(fake) as client:
        for wrong in (X.astype(np.float64), np.zeros((1, 5), np.float32), {"z": X}):
            with pytest.raises(deepar.InputError):
                await client.infer("double", wrong)
    assert not fake.requests


async def test_an_unknown_model_is_named() -> None:
    async with serving(FakeInference()) as client:
        with pytest.raises(deepar.InferenceError, match="no model 'triple'") as refused:
            await client.infer("triple", X)
    assert (refused.value.status, refused.value.repeatable) == (404, False)


@pytest.mark.parametrize("token", [None, TOKEN[:-1], TOKEN])
async def test_only_a_valid_token_is_served(token: str | None) -> None:
    async with serving(FakeInference(), tokens=(TOKEN,), token=token) as client:
        if token == TOKEN:
            assert (await client.infer("double", X)).array.shape == (1, 4)
            async with await client.session("double") as session:
                await session.send(X)
                assert isinstance(await session.receive(), deepar.Answer)
        else:
            with pytest.raises(deepar.InferenceError, match="token") as refused:
                await client.infer("double", X)
            assert refused.value.status == 401


async def test_a_full_queue_says_when_to_try_again_and_then_serves() -> None:
    fake = FakeInference()
    fake.fault = ServingError(Fault.BUSY, "the queue is full", retry_after_s=2.0)
    async with serving(fake) as client:
        with pytest.raises(deepar.InferenceError, match="the queue is full") as refused:
            await client.infer("double", X)
        error = refused.value
        assert (error.status, error.repeatable, error.retry_after_s) == (429, True, 2.0)
        with pytest.raises(deepar.InferenceError) as not_opened:
            await client.session("double")
        error = not_opened.value
        assert (error.status, error.repeatable, error.retry_after_s) == (429, True, 2.0)
        fake.fault = None
        assert (await client.infer("double", X)).array.shape == (1, 4)


async def test_a_request_that_takes_too_long_ends_and_is_cancelled_at_the_endpoint() -> None:
    fake = FakeInference()
    async with serving(fake) as client:
        await client.infer("double", X)
        fake.gate = asyncio.Event()
        with pytest.raises(deepar.InferenceError, match="did not answer within") as late:
            await client.infer("double", X, timeout_s=0.05)
        assert (late.value.status, late.value.repeatable) == (504, False)
        await until(lambda: fake.cancelled == 1)


async def test_an_endpoint_that_is_not_there() -> None:
    async with deepar.AsyncClient(f"127.0.0.1:{free_port()}") as client:
        assert client.url.startswith("http://")
        assert not await client.ready()
        with pytest.raises(deepar.InferenceError, match="Connection refused") as failed:
            await client.infer("double", X)
    assert (failed.value.status, failed.value.repeatable) == (0, True)


async def test_the_client_without_asyncio() -> None:
    fake = FakeInference()

    def use(port: int) -> list[float]:
        with deepar.Client(f"http://127.0.0.1:{port}") as client:
            assert client.ready()
            assert client.models() == ["double"]
            assert client.model("double").inputs[0].shape == (-1, 4)
            assert client.infer("double", X).array.tobytes() == (X + X).tobytes()
            with client.session("double", rate_hz=30.0) as session:
                sent = [session.send(np.full(4, number, np.float32)) for number in range(5)]
                answers = list(session)
        client.close()  # a second time has no effect
        assert [answer.id for answer in answers if isinstance(answer, deepar.Answer)] == sent
        return [float(answer.array[0, 0]) for answer in answers if isinstance(answer, deepar.Answer)]

    async with rest_server(fake) as server:
        assert await asyncio.to_thread(use, server.port) == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert fake.closed_streams == 1


# --- sessions --------------------------------------------------------------------------------------------------------


async def test_frames_and_answers_in_turns_then_the_end() -> None:
    fake = FakeInference()
    async with serving(fake) as client:
        session = await client.session("double", rate_hz=25.0, latency_s=0.2, frames="latest", placement="-cloud")
        async with session:
            for number in range(3):
                frame_id = await session.send(np.full(4, number, np.float32))
                answer = await session.receive()
                assert isinstance(answer, deepar.Answer)
                assert (answer.id, answer.array.tolist()) == (frame_id, [[2.0 * number] * 4])
            await session.end()
            assert await session.receive() is None
            with pytest.raises(deepar.InferenceError, match="has ended"):
                await session.send(X)
        await until(lambda: fake.closed_streams == 1)
    ((terms, keep),) = fake.streams
    assert (terms.rate_hz, terms.latency_s, terms.tiers, keep) == (25.0, 0.2, ("device", "edge"), Keep.LATEST)


async def test_a_frame_that_a_newer_one_replaced_is_an_error_and_the_stream_goes_on() -> None:
    def compute(request: InferRequest) -> Sequence[Array]:
        if request.id == "1":
            raise ServingError(Fault.BUSY, "a newer frame replaced it")
        return doubled(request)

    async with serving(FakeInference(compute=compute)) as client, await client.session("double") as session:
        for _ in range(3):
            await session.send(X)
        await session.end()
        answers = [answer async for answer in session]
    assert [isinstance(answer, deepar.Answer) for answer in answers] == [True, False, True]
    error = answers[1]
    assert isinstance(error, deepar.InferenceError)
    assert error.repeatable
    assert "a newer frame replaced it" in str(error)


async def test_answers_may_be_read_after_all_frames_are_sent() -> None:
    count, size = 2_000, 16_384  # more than the buffers of both ends hold
    large = np.zeros((1, size), np.float32)
    async with serving(FakeInference((tensor("x", (1, size)),))) as client, await client.session("double") as session:
        async with asyncio.timeout(60.0):
            for number in range(count):
                large[0, 0] = number
                await session.send(large)
            await session.end()
            got = [answer async for answer in session]
    assert [float(answer.array[0, 0]) for answer in got if isinstance(answer, deepar.Answer)] == [
        2.0 * number for number in range(count)
    ]


async def test_frames_are_sent_and_answers_read_by_two_tasks_at_once() -> None:
    async with serving(FakeInference()) as client, await client.session("double") as session:

        async def send() -> None:
            for number in range(1_000):
                await session.send(np.full((1, 4), number, np.float32))
            await session.end()

        async with asyncio.timeout(60.0), asyncio.TaskGroup() as group:
            sending = group.create_task(send())
            got = [await session.receive() for _ in range(1_000)]
            await sending
        assert await session.receive() is None
    assert [float(answer.array[0, 0]) for answer in got if isinstance(answer, deepar.Answer)] == [
        2.0 * number for number in range(1_000)
    ]


async def test_a_wrong_frame_is_not_sent_and_counts_as_none() -> None:
    fake = FakeInference()
    async with serving(fake) as client, await client.session("double") as session:
        with pytest.raises(deepar.InputError):
            await session.send(np.zeros((1, 5), np.float32))
        await session.end()
        assert await session.receive() is None
    assert not fake.requests


async def test_a_connection_that_is_lost_in_the_middle_says_how_many_frames_have_no_answer() -> None:
    async def describe(request: web.Request) -> web.Response:
        tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
        return web.json_response({"name": "double", "versions": ["1"], "inputs": [tensor], "outputs": [tensor]})

    async def stream(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        await socket.receive()
        assert request.transport is not None
        request.transport.abort()
        return socket

    application = web.Application()
    application.add_routes([web.get("/v2/models/double", describe), web.get("/v2/models/double/stream", stream)])
    runner = web.AppRunner(application)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        async with deepar.AsyncClient(f"http://127.0.0.1:{port}") as client, await client.session("double") as session:
            await session.send(X)
            await session.send(X)
            with pytest.raises(deepar.InferenceError, match="2 frames without an answer") as lost:
                await session.receive()
            assert lost.value.repeatable
            await session.end()  # the connection is gone, which `receive` has said
            with pytest.raises(deepar.InferenceError):
                await session.receive()
    finally:
        await runner.cleanup()


async def test_a_session_that_is_left_gives_up_its_frames() -> None:
    fake = FakeInference()
    fake.gate = asyncio.Event()
    async with serving(fake) as client:
        async with await client.session("double") as session:
            await session.send(X)
            await until(lambda: bool(fake.requests))
        await until(lambda: fake.cancelled == 1 and fake.closed_streams == 1)


async def test_large_frames_pass_in_both_directions() -> None:
    fake = FakeInference((tensor("x", (1, 1 << 20)),))
    frame = np.arange(1 << 20, dtype=np.float32)
    async with serving(fake) as client, await client.session("double") as session:
        await session.send(frame)
        answer = await session.receive()
    assert isinstance(answer, deepar.Answer)
    assert np.array_equal(answer.array[0], frame * 2)
