"""kserve's own clients, over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc as grpcio
import httpx
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

from tests.clients.cases import DATATYPES, Case, Comparison, given


def request_for(case: Case, *, binary: bool, model: str = "") -> InferRequest:
    described = []
    for name, array in case.inputs.items():
        one = InferInput(name, list(array.shape), DATATYPES[array.dtype.name])
        one.set_data_from_numpy(array, binary_data=binary)
        described.append(one)
    return InferRequest(model_name=model or case.model, infer_inputs=described, request_id="k1")


def outputs_of(answer: Any) -> Any:
    """Reads an output by name, as its sent type."""
    arrays = {output.name: output.as_numpy() for output in answer.outputs}
    return arrays.get


async def check_http(url: str, cases: list[Case], comparison: Comparison) -> None:
    base = f"http://{url}"
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=60)) as client:
        assert await client.is_server_live(base)
        assert await client.is_server_ready(base)
        assert await client.is_model_ready(base, cases[0].model)
        for case in cases:
            for binary in (True, False):
                answer = await client.infer(base, request_for(case, binary=binary), model_name=case.model)
                comparison.same(case, outputs_of(answer), f"kserve, HTTP, binary {binary}")
        try:
            await client.infer(base, request_for(cases[0], binary=False), model_name="no-such-model")
        except httpx.HTTPStatusError as error:
            comparison.refused(error, "", "404", "kserve, HTTP")
        else:
            raise AssertionError("an unknown model answered")


async def check_grpc(url: str, cases: list[Case], comparison: Comparison) -> None:
    async with InferenceGRPCClient(url, timeout=60) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(cases[0].model)
        for case in cases:
            for binary in (True, False):
                answer = await client.infer(request_for(case, binary=binary))
                comparison.same(case, outputs_of(answer), f"kserve, gRPC, binary {binary}")
        try:
            await client.infer(request_for(cases[0], binary=False, model="no-such-model"))
        except grpcio.aio.AioRpcError as error:
            comparison.refused(error, "", "NOT_FOUND", "kserve, gRPC")
        else:
            raise AssertionError("an unknown model answered")


async def check() -> None:
    (cases, http, grpc), comparison = given(), Comparison()
    if http:
        await check_http(http, cases, comparison)
    if grpc:
        await check_grpc(grpc, cases, comparison)
    print(json.dumps({"answers": comparison.answers, "refusals": comparison.refusals}))


if __name__ == "__main__":
    asyncio.run(check())
