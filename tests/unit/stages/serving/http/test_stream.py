"""Streams over a WebSocket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import numpy as np
import pytest

from bus.tensors import Array
from stages.devices.session import Keep
from stages.serving.limits import ServingLimits
from stages.serving.values import Fault, InferRequest, ServingError
from tests.unit.stages.serving.fake_inference import FakeInference
from tests.unit.stages.serving.http.client import rest_server


def frame(number: int, **changes: Any) -> bytes:
    """A frame of four numbers."""
    raw = np.full(4, number, np.float32).tobytes()
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": len(raw)}}
    value = {"id": str(number), "inputs": [tensor | changes], "parameters": {"binary_data_output": True}}
    text = json.dumps(value).encode()
    return len(text).to_bytes(4, "big") + text + raw


def answer(message: aiohttp.WSMessage) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    assert message.type is aiohttp.WSMsgType.BINARY, message
    length = int.from_bytes(message.data[:4], "big")
    return json.loads(message.data[4 : 4 + length]), np.frombuffer(message.data[4 + length :], np.float32)


async def test_frames_are_answered_until_the_client_ends_the_stream() -> None:
    fake = FakeInference()
    async with rest_server(fake) as client, aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{client.port}/v2/models/double/stream?frames=latest&rate_hz=30&latency_s=0.05"
        async with http.ws_connect(url) as socket:
            for number in range(20):
                await socket.send_bytes(frame(number))
            await socket.send_str("end")
            answers = [answer(await socket.receive()) for _ in range(20)]
            closed = await socket.receive()
    assert [value["id"] for value, _ in answers] == [str(number) for number in range(20)]
    assert [float(array[0]) for _, array in answers] == [2.0 * number for number in range(20)]
    assert closed.type is aiohttp.WSMsgType.CLOSE
    ((terms, keep),) = fake.streams
    assert (terms.rate_hz, terms.latency_s, keep) == (30.0, 0.05, Keep.LATEST)
    assert fake.closed_streams == 1
    assert client.admission.requests == client.admission.bytes == 0


async def test_a_refused_frame_has_an_error_and_the_stream_goes_on() -> None:
    async with (
        rest_server(FakeInference()) as client,
        aiohttp.ClientSession() as http,
        http.ws_connect(f"http://127.0.0.1:{client.port}/v2/models/double/stream") as socket,
    ):
        wrong_frames = {
            frame(1, name="z"): "1",
            frame(2) + b"more": "2",
            frame(3, datatype="BYTES"): "3",
            frame(4, shape=[1, 5]): "4",
            b"": "",
            b"\0\0\0\xff{}": "",
            b'\0\0\0\x17{"id":"\\ud800","x":NaN}': "",
        }
        for wrong, frame_id in wrong_frames.items():
            await socket.send_bytes(wrong)
            value, _ = answer(await socket.receive())
            assert value["id"] == frame_id
            assert value["error"]
            assert value["repeatable"] is False
        await socket.send_bytes(frame(5))
        value, array = answer(await socket.receive())
    assert value["id"] == "5"
    assert array.tolist() == [10.0] * 4


async def test_a_frame_over_the_limit_and_one_that_meets_an_unexpected_error_are_refused_by_their_id() -> None:
    def compute(request: InferRequest) -> list[Array]:
        raise RuntimeError("a bug")

    limits = ServingLimits(client_requests=2)
    fake = FakeInference(compute=compute)
    fake.gate = asyncio.Event()
    async with (
        rest_server(fake, limits=limits) as client,
        aiohttp.ClientSession() as http,
        http.ws_connect(f"http://127.0.0.1:{client.port}/v2/models/double/stream") as socket,
    ):
        for number in (7, 8):  # the stream itself is one request
            await socket.send_bytes(frame(number))
        value, _ = answer(await socket.receive())
        assert (value["id"], value["repeatable"]) == ("8", True)
        fake.gate.set()
        value, _ = answer(await socket.receive())
        assert (value["id"], value["repeatable"]) == ("7", False)
        assert "a bug" not in value["error"]


@pytest.mark.parametrize(
    ("query", "fault", "status"),
    [
        ("frames=some", None, 400),
        ("rate_hz=fast", None, 400),
        ("", ServingError(Fault.UNAVAILABLE, "the device drains"), 503),
    ],
)
async def test_a_stream_is_refused_before_it_opens(query: str, fault: ServingError | None, status: int) -> None:
    fake = FakeInference()
    fake.fault = fault
    async with rest_server(fake) as client, aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await http.ws_connect(f"http://127.0.0.1:{client.port}/v2/models/double/stream?{query}")
        assert refused.value.status == status
        plain = await client.ask("GET", "/v2/models/double/stream")
        assert plain.status == 400


async def test_a_text_that_is_no_end_and_a_frame_that_is_too_large_close_the_stream() -> None:
    limits = ServingLimits(body_bytes=1_000)
    async with rest_server(FakeInference(), limits=limits) as client, aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{client.port}/v2/models/double/stream"
        async with http.ws_connect(url) as socket:
            await socket.send_str("stop")
            assert (await socket.receive()).data == 1003
        async with http.ws_connect(url) as socket:
            await socket.send_bytes(bytes(2_000))
            assert (await socket.receive()).data == 1009


async def test_a_client_that_goes_away_ends_its_session() -> None:
    fake = FakeInference()
    fake.gate = asyncio.Event()
    async with rest_server(fake) as client, aiohttp.ClientSession() as http:
        socket = await http.ws_connect(f"http://127.0.0.1:{client.port}/v2/models/double/stream")
        await socket.send_bytes(frame(1))
        async with asyncio.timeout(10.0):
            while not fake.requests:
                await asyncio.sleep(0)
            connection = socket.get_extra_info("socket")
            assert connection is not None
            await http.close()
            while not fake.closed_streams or client.admission.requests:
                await asyncio.sleep(0)
    assert fake.cancelled == 1
