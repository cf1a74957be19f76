"""Thousands of malformed requests: each is refused with the right status, and the server goes on as before."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stages.serving.limits import ServingLimits
from tests.unit.stages.serving.fake_inference import FakeInference
from tests.unit.stages.serving.http.client import Answer, Client, request_bytes, rest_server

INFER = "/v2/models/double/infer"
LIMITS = ServingLimits(body_bytes=1 << 16, json_bytes=1 << 15)
JUNK: tuple[Any, ...] = (None, True, -1, 1.5, "", "z", "\u0000", [], [[]], {}, {"a": []}, 1 << 80, "9" * 300)
PER_SEED, SEEDS = 700, 8
Case = tuple[bytes, set[int]]
"""The bytes of a request, and the statuses of which one is right; 0 stands for a closed connection."""


def valid() -> dict[str, Any]:
    """A request that the fake answers."""
    return {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


def binary(size: Any = 16) -> tuple[bytes, bytes]:
    """The JSON and the raw tensor of a binary request."""
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    return json.dumps({"inputs": [tensor]}).encode(), np.arange(4, dtype=np.float32).tobytes()


def post(body: bytes | dict[str, Any], headers: dict[str, str] | None = None) -> bytes:
    return request_bytes("POST", INFER, body, headers)


def cut_json(r: random.Random) -> Case:
    text = json.dumps(valid()).encode()
    return post(text[: r.randrange(len(text))]), {400}


def random_bytes(r: random.Random) -> Case:
    return post(b"\xff" + r.randbytes(r.randrange(200))), {400}


def flipped_bytes(r: random.Random) -> Case:
    text = bytearray(json.dumps(valid()).encode())
    for _ in range(r.randint(1, 4)):
        text[r.randrange(len(text))] = r.randrange(256)
    return post(bytes(text)), {200, 400}


def junk_in_a_tensor(r: random.Random) -> Case:
    request = valid()
    request["inputs"][0][r.choice(["name", "shape", "datatype", "data"])] = r.choice(JUNK)
    return post(request), {400}


def junk_in_the_request(r: random.Random) -> Case:
    wrong = {"inputs": JUNK, "outputs": JUNK[1:7] + JUNK[9:], "parameters": JUNK[1:9], "id": JUNK[1:4] + JUNK[7:12]}
    key = r.choice(list(wrong))
    return post(valid() | {key: r.choice(wrong[key])}), {400}


def junk_in_a_parameter(r: random.Random) -> Case:
    name = r.choice(["timeout", "priority", "max_link1_bps", "min_agreement", "rate_hz", "placement", "deepar_mode"])
    return post(valid() | {"parameters": {name: r.choice([True, -1, [], {}, "soon", "-moon", float("nan")])}}), {400}


def huge_shape(r: random.Random) -> Case:
    request = valid()
    request["inputs"][0]["shape"] = [r.choice([1, 1 << 31, 1 << 62]) for _ in range(r.randint(3, 60))]
    return post(request), {400}


def deep_nesting(r: random.Random) -> Case:
    depth = r.randint(2_000, 12_000)
    text = json.dumps(valid()).replace("[1, 2, 3, 4]", "[" * depth + r.choice(["", "1", "NaN"]) + "]" * depth)
    return post(text.encode()), {400}


def long_text_among_short_ones(r: random.Random) -> Case:
    request = valid()
    request["inputs"][0] |= {"shape": [1, 4], "data": ["x" * r.randint(1, 5_000), "", 1, 2]}
    return post(request), {400}


def wrong_json_length(r: random.Random) -> Case:
    text, raw = binary()
    length = r.choice([len(text) - r.randint(1, 20), len(text) + 1 + r.randrange(99), -5, "x", "1e3", "", "9" * 40])
    return post(text + raw, {"Inference-Header-Content-Length": str(length)}), {400}


def wrong_raw_size(r: random.Random) -> Case:
    text, raw = binary(r.choice([-1, 0, 15, 17, 1 << 70, 2.5, "16", [], True]))
    return post(text + raw, {"Inference-Header-Content-Length": str(len(text))}), {400}


def wrong_raw_bytes(r: random.Random) -> Case:
    text, raw = binary()
    raw = raw[: r.randrange(16)] if r.random() < 0.5 else raw + r.randbytes(r.randint(1, 50))
    return post(text + raw, {"Inference-Header-Content-Length": str(len(text))}), {400}


def not_the_coding(r: random.Random) -> Case:
    packed = gzip.compress(json.dumps(valid()).encode())
    body = r.choice([packed[: r.randrange(len(packed))], packed + b"x", r.randbytes(50), b""])
    return post(body, {"Content-Encoding": r.choice(["gzip", "deflate", "br", "gzip, gzip", "x" * 500])}), {400}


def bomb(r: random.Random) -> Case:
    return post(gzip.compress(bytes(r.randint(1 << 17, 1 << 22))), {"Content-Encoding": "gzip"}), {413}


def too_large(r: random.Random) -> Case:
    size = r.randint(LIMITS.body_bytes + 1, 1 << 40)
    return post(b"{", {"Content-Length": str(size)}), {413}


def too_much_json(r: random.Random) -> Case:
    return post(b" " * r.randint(LIMITS.json_bytes + 1, LIMITS.body_bytes)), {413}


def too_large_in_chunks(r: random.Random) -> Case:
    chunk = b"%x\r\n%s\r\n" % (1 << 13, b" " * (1 << 13))
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode()
    return head + chunk * r.randint(9, 20), {413}


def broken_chunks(r: random.Random) -> Case:
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode()
    return head + r.choice([b"zz\r\n", b"-1\r\nab\r\n", b"ffffffffffffffffffff\r\n", b"3\r\nabcdef\r\n"]), {0, 400}


def wrong_path(r: random.Random) -> Case:
    word = "".join(r.choice("abc/%20.:;?é") for _ in range(r.randrange(30)))
    return request_bytes("POST", f"/v2/models/none{word}/infer".encode().decode("latin-1")), {400, 404}


def wrong_method(r: random.Random) -> Case:
    return request_bytes(r.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]), INFER, valid()), {405}


def other_host(r: random.Random) -> Case:
    headers = r.choice(
        [{"Host": "evil.example"}, {"Host": "["}, {"Origin": "https://evil.example"}, {"Origin": "null"}]
    )
    return post(valid(), headers), {403}


def not_http(r: random.Random) -> Case:
    return r.randbytes(r.randint(1, 300)) + b"\r\n\r\n", {0, 400}


def broken_stream(r: random.Random) -> Case:
    headers = {"Upgrade": r.choice(["websocket", "h2c", ""]), "Connection": "Upgrade", "Sec-WebSocket-Key": "x"}
    return request_bytes("GET", f"/v2/models/double/stream?frames={r.choice('abc')}", b"", headers), {400}


CASES: tuple[Callable[[random.Random], Case], ...] = (
    *(cut_json, random_bytes, flipped_bytes, junk_in_a_tensor, junk_in_the_request, junk_in_a_parameter, huge_shape),
    *(deep_nesting, long_text_among_short_ones, wrong_json_length, wrong_raw_size, wrong_raw_bytes, not_the_coding),
    *(bomb, too_large, too_much_json, too_large_in_chunks, broken_chunks, wrong_path, wrong_method, other_host),
    *(not_http, broken_stream),
)


async def refuse_all(client: Client, r: random.Random, count: int) -> None:
    for number in range(count):
        make = CASES[number % len(CASES)]
        raw, right = make(r)
        answer: Answer | None = await client.send(raw, half_close=make in (not_http, broken_chunks))
        status = 0 if answer is None else answer.status
        assert status in right, (make.__name__, number, status, raw[:300], answer and answer.body[:300])
        if answer is not None and status != 200 and make is not not_http and b"HEAD" not in raw[:4]:
            assert answer.headers["content-type"].startswith(("application/json", "text/plain"))
            if make not in (broken_chunks, wrong_path):
                assert answer.json["error"]
                assert len(answer.body) < 1_000


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_malformed_requests_are_refused_and_leave_nothing_behind(seed: int) -> None:
    fake = FakeInference()
    r = random.Random(seed)
    async with rest_server(fake, limits=LIMITS) as client:
        await refuse_all(client, r, PER_SEED // 2)
        fake.requests.clear()
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            await refuse_all(client, r, PER_SEED // 2)
            fake.requests.clear()
            answer = await client.ask("POST", INFER, valid())
            fake.requests.clear()
            for _ in range(20):
                await asyncio.sleep(0)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert answer.status == 200
        assert client.admission.requests == client.admission.bytes == 0
        assert after - before < 1 << 19  # one request kept of each kind would be more than 3 MB


def test_the_malformed_requests_are_thousands() -> None:
    assert PER_SEED * SEEDS >= 5_000
