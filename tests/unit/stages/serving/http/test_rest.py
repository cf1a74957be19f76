"""The protocol over HTTP: paths, tensors as JSON and as raw bytes, compression, errors."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest

from bus.tensors import Array
from stages.serving.limits import ServingLimits
from stages.serving.values import Fault, InferRequest, Mode, ServingError
from tests.unit.stages.serving.fake_inference import FakeInference, tensor
from tests.unit.stages.serving.http.client import Answer, read_answer, request_bytes, rest_server

INFER = "/v2/models/double/infer"
X = np.array([[1.5, -2.0, 3.25, 0.1]], np.float32)


def json_request(**changes: Any) -> dict[str, Any]:
    """A request of JSON alone; `changes` replace its keys."""
    given = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": X.tolist()}]}
    return given | changes


def binary_request(array: np.ndarray[Any, Any], datatype: str, **changes: Any) -> tuple[bytes, dict[str, str]]:
    """A request whose tensor follows as raw bytes, and its headers."""
    raw = array.tobytes()
    given = {"name": "x", "shape": list(array.shape), "datatype": datatype}
    text = json.dumps({"inputs": [given | {"parameters": {"binary_data_size": len(raw)}}], **changes}).encode()
    return text + raw, {"Inference-Header-Content-Length": str(len(text))}


def tensors(answer: Answer) -> dict[str, np.ndarray[Any, Any]]:
    """The raw tensors of an answer."""
    length = int(answer.headers["inference-header-content-length"])
    value, at, found = json.loads(answer.body[:length]), length, {}
    for output in value["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]] = np.frombuffer(answer.body[at : at + size], np.float32).reshape(output["shape"])
        at += size
    assert at == len(answer.body)
    return found


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2", {"name": "deepar", "version": "1.2.3"}),
        ("/v2/", {"name": "deepar"}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/double", {"name": "double", "versions": ["1"]}),
        ("/v2/models/double/versions/1", {"name": "double"}),
        ("/v2/models/dou%62le", {"name": "double"}),
        ("/v2/models/double/ready", {"name": "double", "ready": True}),
        ("/v2/models/double/versions/1/ready?x=1", {"ready": True}),
        ("/v2/models/double/config", {"max_batch_size": 1024, "backend": "deepar"}),
    ],
)
async def test_the_paths_that_describe(path: str, expected: dict[str, Any]) -> None:
    async with rest_server(FakeInference()) as client:
        answer = await client.ask("GET", path)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert {name: answer.json[name] for name in expected} == expected


async def test_statistics_and_the_index() -> None:
    async with rest_server(FakeInference()) as client:
        await client.ask("POST", INFER, json_request())
        every = (await client.ask("GET", "/v2/models/stats")).json
        one = (await client.ask("GET", "/v2/models/double/versions/1/stats")).json
        index = (await client.ask("POST", "/v2/repository/index")).json
        only_ready = (await client.ask("POST", "/v2/repository/index", {"ready": True})).json
    assert every == one
    assert one["model_stats"][0]["inference_count"] == 1
    assert index == only_ready == [{"name": "double", "version": "1", "state": "READY", "reason": ""}]


async def test_a_server_that_is_not_ready_says_so() -> None:
    fake = FakeInference()
    fake.is_ready = fake.is_live = False
    async with rest_server(fake) as client:
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/double/ready"):
            assert (await client.ask("GET", path)).status == 503
        assert (await client.ask("POST", "/v2/repository/index")).json[0]["state"] == "UNAVAILABLE"
        assert (await client.ask("POST", "/v2/repository/index", {"ready": True})).json == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/models/double", 404),
        ("GET", "/v2/models/triple", 404),
        ("GET", "/v2/models/double/versions/2", 404),
        ("GET", "/v2/models/double/weights", 404),
        ("GET", "/v2/health/well", 404),
        ("POST", "/v2/models/triple/infer", 404),
        ("GET", INFER, 405),
        ("POST", "/v2", 405),
        ("POST", "/v2/models/double", 405),
        ("DELETE", "/v2/health/live", 405),
        ("POST", "/v2/repository/models/double/load", 501),
        ("POST", "/v2/repository/models/double/unload", 501),
        ("GET", "/v2/systemsharedmemory/status", 501),
        ("GET", "/v2/trace/setting", 501),
    ],
)
async def test_a_path_or_method_that_is_not_there(method: str, path: str, status: int) -> None:
    async with rest_server(FakeInference()) as client:
        answer = await client.ask(method, path)
    assert answer.status == status
    assert answer.json["error"]
    assert answer.json["repeatable"] is False
    assert ("allow" in answer.headers) is (status == 405)


@pytest.mark.parametrize("data", [X.tolist(), X.ravel().tolist(), X.reshape(2, 2).tolist()])
async def test_json_in_and_out(data: list[Any]) -> None:
    fake = FakeInference()
    request = json_request(id="7", parameters={"timeout": 1_500_000, "deepar_mode": "request"})
    request["inputs"][0]["data"] = data
    async with rest_server(fake) as client:
        answer = await client.ask("POST", INFER, request)
    assert answer.status == 200
    assert answer.json["model_name"] == "double"
    assert answer.json["model_version"] == "1"
    assert answer.json["id"] == "7"
    assert answer.json["parameters"]["deepar_kind"] == "device"
    (output,) = answer.json["outputs"]
    assert (output["name"], output["shape"], output["datatype"]) == ("y", [1, 4], "FP32")
    assert "parameters" not in output  # Triton's client would look for raw bytes
    assert np.array(output["data"], np.float32).tobytes() == (X + X).tobytes()
    assert fake.requests[0].terms.timeout_s == 1.5
    assert fake.requests[0].terms.mode is Mode.REQUEST
    assert fake.requests[0].client == "127.0.0.1"


@pytest.mark.parametrize(
    "wish",
    [
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]},
    ],
)
async def test_raw_bytes_in_and_out(wish: dict[str, Any]) -> None:
    given = np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32)
    given[0, 0] = np.nan
    async with rest_server(FakeInference()) as client:
        body, headers = binary_request(given, "FP32", **wish)
        answer = await client.ask("POST", INFER, body, headers)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    assert tensors(answer)["y"].tobytes() == (given + given).tobytes()


async def test_json_outputs_may_follow_raw_inputs_and_the_other_way_round() -> None:
    async with rest_server(FakeInference()) as client:
        body, headers = binary_request(X, "FP32")
        as_json = await client.ask("POST", INFER, body, headers)
        as_raw = await client.ask("POST", INFER, json_request(parameters={"binary_data_output": True}))
        mixed = json_request(
            parameters={"binary_data_output": True}, outputs=[{"name": "y", "parameters": {"binary_data": False}}]
        )
        unwished = await client.ask("POST", INFER, mixed)
    assert as_json.json["outputs"][0]["data"] == (X + X).ravel().tolist()
    assert tensors(as_raw)["y"].tobytes() == (X + X).tobytes()
    assert unwished.json["outputs"] == as_json.json["outputs"]


@pytest.mark.parametrize(
    ("dtype", "datatype", "values"),
    [
        ("bool", "BOOL", [True, False, True, True]),
        ("int8", "INT8", [-64, 0, 1, 63]),
        ("uint8", "UINT8", [0, 1, 2, 127]),
        ("int16", "INT16", [-16_384, 0, 1, 16_383]),
        ("uint16", "UINT16", [0, 1, 2, 32_767]),
        ("int32", "INT32", [-(2**30), 0, 1, 2**30 - 1]),
        ("uint32", "UINT32", [0, 1, 2, 2**31 - 1]),
        ("int64", "INT64", [-(2**62), 0, 1, 2**62 - 1]),
        ("uint64", "UINT64", [0, 1, 2, 2**63 - 1]),
        ("float16", "FP16", [0.1, -2.5, 3, 60000]),
        ("float32", "FP32", [0.1, -1e-40, 3.4e38, 7]),
        ("float64", "FP64", [0.1, 5e-324, 1e308, -1 / 3]),
    ],
)
async def test_every_datatype_in_json_and_raw(dtype: str, datatype: str, values: list[Any]) -> None:
    given = np.array([values], dtype)
    fake = FakeInference((tensor("x", dtype=dtype),), compute=lambda request: list(request.inputs.values()))
    async with rest_server(fake) as client:
        entry = {"name": "x", "shape": [1, 4], "datatype": datatype, "data": [values]}
        as_json = await client.ask("POST", INFER, {"inputs": [entry]})
        body, headers = binary_request(given, datatype, parameters={"binary_data_output": True})
        as_raw = await client.ask("POST", INFER, body, headers)
    assert np.array(as_json.json["outputs"][0]["data"], dtype).tobytes() == given.tobytes()
    assert as_json.json["outputs"][0]["datatype"] == datatype
    assert as_raw.body.endswith(given.tobytes())
    assert [one.inputs["x"].tobytes() for one in fake.requests] == [given.tobytes()] * 2


async def test_numbers_that_json_lacks_are_null_and_named() -> None:
    text = b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [NaN, Infinity, -Infinity, 1]}]}'
    async with rest_server(FakeInference()) as client:
        answer = await client.ask("POST", INFER, text)
    assert answer.status == 200
    assert answer.json["outputs"][0]["data"] == [None, None, None, 2.0]
    assert answer.json["parameters"]["deepar_not_finite"] == "y"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_bodies_are_compressed_both_ways(coding: str) -> None:
    given = np.zeros((64, 4), np.float32)
    body, headers = binary_request(given, "FP32", parameters={"binary_data_output": True})
    packed = gzip.compress(body) if coding == "gzip" else zlib.compress(body)
    headers |= {"Content-Encoding": coding, "Accept-Encoding": coding}
    async with rest_server(FakeInference()) as client:
        answer = await client.ask("POST", INFER, packed, headers)
        plain = await client.ask(
            "POST", INFER, body, headers | {"Content-Encoding": "identity", "Accept-Encoding": "br"}
        )
    assert answer.status == plain.status == 200
    assert answer.headers["content-encoding"] == coding
    assert "content-encoding" not in plain.headers
    assert (gzip.decompress if coding == "gzip" else zlib.decompress)(answer.body) == plain.body


async def test_deflate_without_its_header_is_read() -> None:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = packer.compress(json.dumps(json_request()).encode()) + packer.flush()
    async with rest_server(FakeInference()) as client:
        assert (await client.ask("POST", INFER, packed, {"Content-Encoding": "deflate"})).status == 200


async def test_a_chunked_body_is_read() -> None:
    text = json.dumps(json_request()).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (text[:50], text[50:])) + b"0\r\n\r\n"
    raw = b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode() + chunks
    async with rest_server(FakeInference()) as client:
        answer = await client.send(raw)
    assert answer is not None
    assert answer.status == 200


async def test_a_client_that_waits_for_the_word_to_send_gets_it() -> None:
    raw = request_bytes("POST", INFER, json_request(), {"Expect": "100-continue"})
    head, _, body = raw.partition(b"\r\n\r\n")
    async with rest_server(FakeInference()) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        answer = await read_answer(reader)
        writer.close()
    assert answer is not None
    assert answer.status == 200


def entry(**changes: Any) -> dict[str, Any]:
    """A request whose one input has other keys."""
    return {"inputs": [json_request()["inputs"][0] | changes]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be an object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"inputs": NaN' + b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ({}, "inputs must be a list"),
        ({"inputs": [3]}, "object with a name"),
        ({"inputs": []}, "input 'x' is missing"),
        ({"inputs": [json_request()["inputs"][0]] * 2}, "input 'x' is given twice"),
        (json_request(id=7), "id must be a string"),
        (json_request(parameters=[]), "parameters of the request"),
        (json_request(parameters={"timeout": "soon"}), "parameter 'timeout'"),
        (json_request(parameters={"binary_data_output": 1}), "'binary_data_output'"),
        (json_request(outputs={}), "outputs must be a list"),
        (json_request(outputs=["y"]), "object with a name"),
        (json_request(outputs=[{"name": "y"}, {"name": "y"}]), "'y' is requested twice"),
        (json_request(outputs=[{"name": "y", "parameters": {"classification": 3}}]), "classification"),
        (json_request(outputs=[{"name": "y", "parameters": {"binary_data": "no"}}]), "'binary_data'"),
        (json_request(outputs=[{"name": "z"}]), "no output 'z'"),
        (entry(name=None), "object with a name"),
        (entry(datatype=1), "input 'x': datatype must be a string"),
        (entry(datatype="BYTES"), "datatype 'BYTES' is none of"),
        (entry(shape="1x4"), "input 'x': shape must be a list"),
        (entry(shape=[1, 4.0]), "input 'x': shape must be a list"),
        (entry(shape=[True, 4]), "input 'x': shape must be a list"),
        (entry(shape=[1, -4]), "all positive"),
        (entry(data=[[1, 2, 3], [4]]), "nested lists of equal lengths"),
        (b'{"id": "\\ud800", "inputs": [], "x": NaN}', "id must be a string"),
        (json_request(parameters={"timeout": 10**400, "x": float("nan")}), "parameter 'timeout'"),
        (entry(shape=[(1 << 31) - 1] * 8), "4 values, but the shape"),
        (entry(data=None), "input 'x': it needs data"),
        (entry(data={"0": 1}), "input 'x': it needs data"),
        (entry(data=[1, 2, 3]), "input 'x': 3 values, but the shape"),
        (entry(data=[[1, 2], 3, 4]), "nested lists of equal lengths"),
        (entry(data=[1, 2, 3, "4"]), "a value is not of type FP32"),
        (entry(data=[1, 2, 3, None]), "a value is not of type FP32"),
        (entry(data=[1, 2, 3, 1e39]), "a value does not fit into FP32"),
        (entry(data=[1, 2, 3, 10**400]), "not JSON"),
        (entry(parameters={"binary_data_size": 16}), "both data and binary_data_size"),
    ],
)
async def test_a_wrong_request_is_refused_with_the_reason(body: bytes | dict[str, Any], words: str) -> None:
    fake = FakeInference()
    async with rest_server(fake) as client:
        answer = await client.ask("POST", INFER, body)
        again = await client.ask("POST", INFER, json_request())
    assert answer.status == 400
    assert words in answer.json["error"]
    assert len(answer.body) < 600
    assert again.status == 200


@pytest.mark.parametrize(
    ("datatype", "dtype", "value"),
    [("INT8", "int8", 128), ("UINT8", "uint8", -1), ("INT64", "int64", 2**63), ("UINT64", "uint64", -1)]
    + [("INT32", "int32", 1.5), ("BOOL", "bool", 1), ("INT16", "int16", "1"), ("FP16", "float16", 70_000)],
)
async def test_a_value_that_the_datatype_lacks_is_refused(datatype: str, dtype: str, value: Any) -> None:
    async with rest_server(FakeInference((tensor("x", (1, 2), dtype),))) as client:
        given = {"name": "x", "shape": [1, 2], "datatype": datatype, "data": [value, value]}
        answer = await client.ask("POST", INFER, {"inputs": [given]})
    assert answer.status == 400
    assert (
        f"input 'x': a value {'does not fit into' if isinstance(value, int) and dtype != 'bool' else 'is not of type'}"
        in (answer.json["error"])
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body, headers: (body[:-1], headers), "binary_data_size 16, but 15 bytes"),
        (lambda body, headers: (body + b"x", headers), "1 bytes follow the last raw tensor"),
        (lambda body, headers: (body, {"Inference-Header-Content-Length": "9999"}), "length of the JSON"),
        (lambda body, headers: (body, {"Inference-Header-Content-Length": "-1"}), "length of the JSON"),
        (lambda body, headers: (body, {"Inference-Header-Content-Length": "9" * 50}), "length of the JSON"),
        (lambda body, headers: (body, {}), "raw tensors need the header"),
        (lambda body, headers: (body.replace(b": 16", b": -1"), headers), "binary_data_size -1"),
        (lambda body, headers: (body.replace(b": 16", b":[1]"), headers), "binary_data_size"),
        (lambda body, headers: (body, headers | {"Content-Encoding": "gzip"}), "the body is not gzip"),
        (lambda body, headers: (gzip.compress(body)[:-9], headers | {"Content-Encoding": "gzip"}), "truncated"),
        (lambda body, headers: (gzip.compress(body) + b"x", headers | {"Content-Encoding": "gzip"}), "1 bytes follow"),
        (lambda body, headers: (body, headers | {"Content-Encoding": "br"}), "Content-Encoding 'br'"),
    ],
)
async def test_a_wrong_raw_body_is_refused_with_the_reason(change: Any, words: str) -> None:
    body, headers = change(*binary_request(X, "FP32"))
    async with rest_server(FakeInference()) as client:
        answer = await client.ask("POST", INFER, body, headers)
    assert answer.status == 400
    assert words in answer.json["error"]


@pytest.mark.parametrize("fault", [one for one in Fault if one is not Fault.CANCELLED])
async def test_every_fault_has_its_status(fault: Fault) -> None:
    fake = FakeInference()
    fake.fault = ServingError(fault, "the reason", retry_after_s=1.2 if fault is Fault.BUSY else None)
    async with rest_server(fake) as client:
        answer = await client.ask("POST", INFER, json_request())
    assert answer.status == fault.http
    assert answer.json["error"].startswith("the reason")
    assert ("may be repeated" in answer.json["error"]) is fault.repeatable
    assert answer.headers.get("retry-after") == ("2" if fault is Fault.BUSY else None)


async def test_an_unexpected_error_hides_its_text() -> None:
    def fail(request: InferRequest) -> list[Array]:
        raise IndexError("list index")

    fake = FakeInference(compute=fail)
    async with rest_server(fake) as client:
        answer = await client.ask("POST", INFER, json_request())
    assert answer.status == 500
    assert "list index" not in answer.json["error"]


async def test_a_client_that_goes_away_cancels_its_request() -> None:
    fake = FakeInference()
    fake.gate = asyncio.Event()
    async with rest_server(fake) as client:
        _, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(request_bytes("POST", INFER, json_request()))
        async with asyncio.timeout(10.0):
            while not fake.requests:
                await asyncio.sleep(0)
            writer.transport.abort()
            while not fake.cancelled:
                await asyncio.sleep(0)
            while client.admission.requests:
                await asyncio.sleep(0)
    assert client.admission.bytes == 0


async def test_requests_on_one_connection_are_answered_in_turn() -> None:
    async with rest_server(FakeInference()) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        for name in "abc":
            writer.write(request_bytes("POST", INFER, json_request(id=name)))
        answers = [await read_answer(reader) for _ in "abc"]
        writer.close()
    assert [answer.json["id"] for answer in answers if answer is not None] == ["a", "b", "c"]


async def test_large_answers_and_requests_pass() -> None:
    given = np.random.default_rng(6).standard_normal((1, 3_000_000)).astype(np.float32)
    body, headers = binary_request(given, "FP32", parameters={"binary_data_output": True})
    async with rest_server(FakeInference((tensor("x", (1, 3_000_000)),)), limits=ServingLimits()) as client:
        answer = await client.ask("POST", INFER, body, headers)
    assert tensors(answer)["y"].tobytes() == (given + given).tobytes()
