"""Thousands of malformed messages: each is refused with the right status, and the endpoint goes on."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import grpc
import numpy as np

from stages.serving.grpc.schema import CLASSES
from stages.serving.grpc.service import PATH
from stages.serving.tensors import DATATYPES
from tests.unit.stages.serving.fake_inference import FakeInference, tensor
from tests.unit.stages.serving.grpc.calls import Client, infer_request, parameters, raw_request, serving

MESSAGES = 3_000
ONES = np.ones((2, 4), np.float32)
OTHER_CALLS = ("ServerLive", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex")


def wrong_request(numbers: random.Random) -> tuple[Any, str]:
    """A message of the right form with one fault, and the status that it deserves."""
    request = raw_request(ONES, np.ones((2, 2), np.int8), id=str(numbers.random()))
    fault = numbers.randrange(12)
    tensor = numbers.choice(request.inputs)
    if fault == 0:
        request.model_name = numbers.choice(["", "other", "double\0", "d" * 5000, "../double"])
        return request, "NOT_FOUND"
    if fault == 1:
        request.model_version = numbers.choice(["0", "2", "one", "-1"])
        return request, "NOT_FOUND"
    if fault == 2:
        numbers.choice([request.inputs, request.raw_input_contents]).pop()
    elif fault == 3:
        tensor.name = numbers.choice(["", "z", "x\n", "n" * 100_000])
        if numbers.random() < 0.5:
            request.raw_input_contents[0] = b""
    elif fault == 4:
        tensor.datatype = numbers.choice([*(set(DATATYPES) - {tensor.datatype}), "BYTES", "BF16", "", "float32", "\0"])
    elif fault == 5:
        extents = [-1, 0, 3, 2**31, 2**63 - 1, -(2**63)]
        tensor.shape[numbers.randrange(2)] = numbers.choice(extents)
    elif fault == 6:
        tensor.shape.extend([numbers.choice([-1, 0, 2, 2**40])] * numbers.choice([1, 40, 5000]))
    elif fault == 7:
        at = numbers.randrange(2)
        raw = request.raw_input_contents[at]
        request.raw_input_contents[at] = numbers.choice([b"", raw[:-1], raw + b"\0", raw * 2])
    elif fault == 8:
        tensor.contents.fp32_contents.extend([1.0] * 8)
    elif fault == 9:
        wrong: dict[str, list[Any]] = {
            "timeout": [-1, "soon", 0.5, float("nan")],
            "priority": [-3, True, "high"],
            "placement": ["nowhere", 3, "-device,-edge,-cloud"],
            "max_link1_bps": [-1, float("inf")],
            "min_agreement": [2, -1.0],
            "rate_hz": [0, -5],
            "sequence_id": [1.5, "x" * 500],
        }
        name = numbers.choice(sorted(wrong))
        value = parameters(**{name: numbers.choice(wrong[name])})[name]
        request.parameters[name].CopyFrom(value)
    elif fault == 10:
        request.outputs.add(name=numbers.choice(["", "x", "y9"]))
    else:
        request.id = "i" * numbers.choice([1025, 100_000])
    return request, "INVALID_ARGUMENT"


def damaged(data: bytes, numbers: random.Random) -> bytes:
    """A message with some bytes changed, removed or added."""
    text = bytearray(data)
    for _ in range(numbers.randrange(1, 6)):
        at = numbers.randrange(len(text) + 1)
        change = numbers.randrange(4)
        if change == 0 and at < len(text):
            text[at] ^= 1 << numbers.randrange(8)
        elif change == 1:
            del text[at:]
        elif change == 2:
            text[at:at] = numbers.randbytes(numbers.randrange(1, 12))
        else:
            text[at:at] = bytes([numbers.choice([0x3A, 0x2A, 0x22]), *[0xFF] * numbers.randrange(1, 12), 0x7F])
    return bytes(text)


async def status(client: Client, name: str, data: bytes) -> str:
    try:
        await client.channel.unary_unary(PATH + name)(data, timeout=60)
    except grpc.aio.AioRpcError as refused:
        return str(refused.code().name)
    return "OK"


def two_inputs() -> FakeInference:
    return FakeInference((tensor("x", (1, 4)), tensor("x2", (1, 2), "int8")))


async def test_a_request_with_one_fault_is_refused_with_its_status() -> None:
    numbers = random.Random(1509)
    inference = two_inputs()
    async with serving(inference) as client:
        for _ in range(MESSAGES):
            request, expected = wrong_request(numbers)
            got = await status(client, "ModelInfer", request.SerializeToString())
            assert got == expected, request
        await client.call("ModelInfer", raw_request(ONES, np.ones((2, 2), np.int8)))


async def test_damaged_messages_end_nothing_and_are_never_an_internal_error() -> None:
    numbers = random.Random(1510)
    valid = raw_request(
        ONES, np.ones((2, 2), np.int8), id="1", parameters=parameters(timeout=10**7)
    ).SerializeToString()
    typed = infer_request(
        inputs=[
            {"name": "x", "datatype": "FP32", "shape": [1, 4], "contents": {"fp32_contents": [1, 2, 3, 4]}},
            {"name": "x2", "datatype": "INT8", "shape": [1, 2], "contents": {"int_contents": [1, -2]}},
        ]
    ).SerializeToString()
    got: Counter[str] = Counter()
    async with serving(two_inputs()) as client:
        for _ in range(MESSAGES):
            got[await status(client, "ModelInfer", damaged(numbers.choice([valid, typed]), numbers))] += 1
        for _ in range(MESSAGES // 4):
            data = numbers.randbytes(numbers.randrange(200))
            got[await status(client, numbers.choice(["ModelInfer", *OTHER_CALLS]), data)] += 1
        await client.call("ModelInfer", valid)
    assert set(got) == {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
    assert got["INVALID_ARGUMENT"] > MESSAGES / 2, got


async def test_damaged_messages_on_a_stream_end_no_stream() -> None:
    numbers = random.Random(1511)
    valid = raw_request(ONES, np.ones((2, 2), np.int8), id="1").SerializeToString()
    async with serving(two_inputs()) as client:
        stream = client.stream()
        for _ in range(MESSAGES // 3):
            await stream.write(damaged(valid, numbers))
            answer = CLASSES["ModelStreamInferResponse"].FromString(await stream.read())
            assert answer.infer_response.parameters["triton_final_response"].bool_param
            told = answer.infer_response.parameters["deepar_status"].string_param
            assert told == "" if not answer.error_message else told in ("INVALID_ARGUMENT", "NOT_FOUND")
        await stream.write(valid)
        assert CLASSES["ModelStreamInferResponse"].FromString(await stream.read()).error_message == ""
