"""What the server refuses before it reads a body, and what it does with clients that are slow or many."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stages.serving.limits import ServingLimits
from tests.unit.stages.serving.fake_inference import FakeInference
from tests.unit.stages.serving.http.client import read_answer, request_bytes, rest_server

INFER = "/v2/models/double/infer"
REQUEST = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
TOKEN = "0123456789abcdef"


async def test_a_token_is_demanded_everywhere_but_for_health() -> None:
    async with rest_server(FakeInference(), tokens=(TOKEN,)) as client:
        for method, path in (("GET", "/v2"), ("POST", INFER), ("GET", "/v2/models/none"), ("GET", "/nothing")):
            answer = await client.ask(method, path)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            wrong = await client.ask(method, path, b"", {"Authorization": "Bearer fedcba9876543210"})
            assert wrong.status == 401
        assert (await client.ask("GET", "/v2/health/live")).status == 200
        right = await client.ask("POST", INFER, REQUEST, {"Authorization": f"Bearer {TOKEN}"})
        assert right.status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Content-Length": str(1 << 40)}, 413), ({"Content-Length": str(1 << 40), "Expect": "100-continue"}, 413)],
)
async def test_a_body_over_the_limit_is_refused_before_it_is_sent(headers: dict[str, str], status: int) -> None:
    async with rest_server(FakeInference()) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(request_bytes("POST", INFER, b"", headers))
        answer = await read_answer(reader)
        writer.close()
    assert answer is not None
    assert answer.status == status


async def test_a_slow_body_times_out() -> None:
    limits = ServingLimits(body_s=0.05, slowest_bytes_per_s=1 << 30)
    async with rest_server(FakeInference(), limits=limits) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(request_bytes("POST", INFER, b"{", {"Content-Length": "100"}))
        answer = await read_answer(reader)
        writer.close()
        assert client.admission.requests == 0
    assert answer is not None
    assert answer.status == 408
    assert answer.json["repeatable"] is True


async def test_a_connection_without_a_request_is_dropped() -> None:
    async with rest_server(FakeInference(), limits=ServingLimits(head_s=0.05)) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(b"POST /v2/models/double/infer HTTP/1.1\r\nHost: loc")
        async with asyncio.timeout(10.0):
            assert await reader.read() == b""
        writer.close()
        served, kept = await asyncio.open_connection("127.0.0.1", client.port)
        kept.write(request_bytes("GET", "/v2"))
        assert await read_answer(served) is not None
        kept.write(request_bytes("GET", "/v2"))
        assert await read_answer(served) is not None
        kept.close()


async def test_connections_over_the_limit_are_closed() -> None:
    async with rest_server(FakeInference(), limits=ServingLimits(connections=1)) as client:
        first, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(request_bytes("GET", "/v2"))
        assert await read_answer(first) is not None
        assert await client.send(request_bytes("GET", "/v2")) is None
        writer.close()


async def test_requests_over_the_limit_are_told_when_to_try_again() -> None:
    fake = FakeInference()
    fake.gate = asyncio.Event()
    async with rest_server(fake, limits=ServingLimits(client_requests=2)) as client:
        waiting = [asyncio.create_task(client.ask("POST", INFER, REQUEST)) for _ in range(2)]
        async with asyncio.timeout(10.0):
            while len(fake.requests) < 2:
                await asyncio.sleep(0)
        refused = await client.ask("POST", INFER, REQUEST)
        fake.gate.set()
        answers = [await one for one in waiting]
    assert (refused.status, refused.headers["retry-after"], refused.json["repeatable"]) == (429, "1", True)
    assert [one.status for one in answers] == [200, 200]


async def test_no_input_and_no_output_in_the_log(caplog: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeInference(compute=lambda request: [request.inputs["secret"]])
    secret = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 987654321]}]}
    async with rest_server(fake) as client:
        answer = await client.ask("POST", INFER, secret)
        await client.send(b"SECRET-987654321 \x00 HTTP/9\r\n\r\n")
    out, err = capsys.readouterr()
    assert answer.status == 500
    assert "request failed" in out + err + caplog.text
    assert "987654321" not in out + err
