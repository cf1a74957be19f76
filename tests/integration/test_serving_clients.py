"""Public inference clients, unchanged, against the endpoint over a fake `Inference`: what they send and expect."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from bus.tensors import Array
from stages.serving.grpc.endpoint import grpc_endpoint
from stages.serving.http.rest import RestServer
from stages.serving.http.server import serving_http
from stages.serving.limits import Admission, ServingLimits
from stages.serving.security import Guard, Listening
from stages.serving.values import InferRequest
from tests.client_environment import Clients
from tests.clients.cases import Case, save
from tests.unit.stages.serving.fake_inference import FakeInference, tensor

INPUTS = (tensor("x", (1, 3, 4)), tensor("counts", (1, 2), "int32"))
OUTPUTS = (tensor("scaled", (1, 3, 4)), tensor("sum", (1,), "float64"), tensor("positive", (1, 2), "bool"))


def computed(request: InferRequest) -> Sequence[Array]:
    """Two inputs to three outputs of three types, in the order of `OUTPUTS`."""
    x, counts = request.inputs["x"], request.inputs["counts"]
    return [x * np.float32(1.1), x.astype(np.float64).sum(axis=(1, 2)) + counts[:, 0], counts > 0]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    numbers = np.random.default_rng(15)
    inputs = {
        "x": numbers.normal(size=(3, 3, 4)).astype(np.float32),
        "counts": numbers.integers(-9, 9, (3, 2)).astype(np.int32),
    }
    outputs = computed(InferRequest(model="double", inputs=inputs))
    case = Case("double", inputs, {info.name: array for info, array in zip(OUTPUTS, outputs, strict=True)})
    save(tmp_path, case)
    return case


@contextlib.asynccontextmanager
async def endpoint(inference: FakeInference) -> AsyncIterator[tuple[str, str]]:
    """The addresses of the endpoint over HTTP and gRPC."""
    listening = Listening(host="127.0.0.1", port=0)
    admission = Admission(ServingLimits())
    rest = RestServer(inference, Guard(listening), admission, version="0")
    async with (
        serving_http(rest.handle, listening, admission.limits) as http_port,
        grpc_endpoint(inference, listening, admission) as grpc_port,
    ):
        yield f"127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}"


async def test_tritonclient_over_http_and_grpc_sync_and_async(clients: Clients, case: Case, tmp_path: Path) -> None:
    inference = FakeInference(INPUTS, OUTPUTS, computed)
    async with endpoint(inference) as (http, grpc):
        done = await clients.run("triton_calls", str(tmp_path), http, grpc)
    assert done == {"answers": 41, "refusals": 16, "kinds": []}
    assert {request.client for request in inference.requests} == {"127.0.0.1"}


async def test_kserve_over_http_and_grpc(clients: Clients, case: Case, tmp_path: Path) -> None:
    async with endpoint(FakeInference(INPUTS, OUTPUTS, computed)) as (http, grpc):
        done = await clients.run("kserve_calls", str(tmp_path), http, grpc)
    assert done == {"answers": 4, "refusals": 2}


async def test_curl(case: Case) -> None:
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": [3, 3, 4], "data": case.inputs["x"].tolist()},
        {"name": "counts", "datatype": "INT32", "shape": [3, 2], "data": case.inputs["counts"].flatten().tolist()},
    ]
    async with endpoint(FakeInference(INPUTS, OUTPUTS, computed)) as (http, _):
        process = await asyncio.create_subprocess_exec(
            *("curl", "--silent", "--show-error", "--fail", "--max-time", "60", "--data", "@-"),
            f"http://{http}/v2/models/double/infer",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate(json.dumps({"inputs": inputs}).encode())
    assert process.returncode == 0
    answered = {one["name"]: one for one in json.loads(out)["outputs"]}
    for name, expected in case.outputs.items():
        got = np.array(answered[name]["data"], expected.dtype).reshape(answered[name]["shape"])
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("how", ["-i http", "-i http -b 4", "-i grpc", "-i grpc --streaming"])
async def test_perf_analyzer(how: str) -> None:
    """Its wheel needs glibc 2.38; where that is newer than the machine's, the command names a loader and its libraries."""
    command = os.environ.get("DEEPAR_TEST_PERF_ANALYZER", "").split()
    if not command:
        pytest.skip("DEEPAR_TEST_PERF_ANALYZER does not name the command of Triton's perf_analyzer")
    inference = FakeInference(INPUTS, OUTPUTS, computed)
    async with endpoint(inference) as (http, grpc):
        process = await asyncio.create_subprocess_exec(
            *command,
            *("-m", "double", *how.split(), "-u", http if "http" in how else grpc),
            *("--concurrency-range", "2", "-p", "700", "-s", "100000", "-r", "3"),  # -s: any spread counts as stable
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(120.0):
                out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    assert process.returncode == 0, out.decode()
    assert "throughput:" in out.decode()
    assert len(inference.requests) > 10
