"""tritonclient, over HTTP and gRPC, synchronous and asynchronous: health, descriptions, inferences, streams and refusals."""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException

from tests.clients.cases import DATATYPES, Case, Comparison, first, given

STREAMED = 8
"""Requests on a stream."""

PLACEMENTS = (
    ("request", "edge"),
    ("request", "cloud"),
    ("request", "device,edge"),
    ("session", "device"),
    ("session", "edge"),
    ("session", "-device"),
)
"""`deepar_mode` and `placement` of requests."""


def inputs(library: Any, case: Case, **how: Any) -> list[Any]:
    """The inputs of a case, as a library describes them."""
    described = []
    for name, array in case.inputs.items():
        one = library.InferInput(name, list(array.shape), DATATYPES[array.dtype.name])
        one.set_data_from_numpy(array, **how)
        described.append(one)
    return described


def check_descriptions(client: Any, case: Case, as_json: dict[str, Any]) -> None:
    """Health, metadata, configuration, index and statistics."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(case.model)
    assert client.is_model_ready(case.model, "1")
    assert not client.is_model_ready("no-such-model")
    check_answers(
        case,
        client.get_server_metadata(**as_json),
        client.get_model_metadata(case.model, **as_json),
        client.get_model_config(case.model, **as_json),
        client.get_model_repository_index(**as_json),
    )
    for asked in ((), (case.model,), (case.model, "1")):
        statistics = client.get_inference_statistics(*asked, **as_json)["model_stats"]
        assert case.model in [one["name"] for one in statistics]


def check_answers(case: Case, server: Any, metadata: Any, config: Any, index: Any) -> None:
    """What the server says of itself and of a model."""
    assert server["name"] == "deepar"
    assert {one["name"] for one in metadata["inputs"]} == set(case.inputs)
    assert {one["name"] for one in metadata["outputs"]} == set(case.outputs)
    assert metadata["versions"] == ["1"]
    config = config.get("config", config)
    assert {one["name"] for one in config["input"]} == set(case.inputs)
    assert config["name"] == case.model
    models = index["models"] if isinstance(index, dict) else index
    assert {"name": case.model, "version": "1", "state": "READY"}.items() <= next(
        one for one in models if one["name"] == case.model
    ).items()


def check_refusals(client: Any, library: Any, case: Case, comparison: Comparison, statuses: dict[str, str]) -> None:
    """Wrong requests: the model, the shape, the datatype, a missing input, an unknown output, models that are loaded."""
    good = inputs(library, case)
    name, array = next(iter(case.inputs.items()))
    wrong_shape = library.InferInput(name, [*array.shape, 2], DATATYPES[array.dtype.name])
    wrong_shape.set_data_from_numpy(np.stack([array, array], axis=-1))
    other = np.float64 if array.dtype != np.float64 else np.float32
    wrong_type = library.InferInput(name, list(array.shape), DATATYPES[np.dtype(other).name])
    wrong_type.set_data_from_numpy(array.astype(other))
    calls: list[tuple[str, str, Callable[[], Any]]] = [
        ("unknown", "no-such-model", lambda: client.infer("no-such-model", good)),
        ("unknown", "", lambda: client.infer(case.model, good, model_version="7")),
        ("invalid", name, lambda: client.infer(case.model, [wrong_shape, *good[1:]])),
        ("invalid", name, lambda: client.infer(case.model, [wrong_type, *good[1:]])),
        ("invalid", name, lambda: client.infer(case.model, [])),
        (
            "invalid",
            "no-such-output",
            lambda: client.infer(case.model, good, outputs=[library.InferRequestedOutput("no-such-output")]),
        ),
        ("unimplemented", "", lambda: client.load_model(case.model)),
        ("unimplemented", "", lambda: client.unload_model(case.model)),
    ]
    for status, text, call in calls:
        try:
            call()
        except InferenceServerException as error:
            comparison.refused(error, statuses[status], text, f"{library.__name__}, {text}")
        else:
            raise AssertionError(f"{library.__name__}: a wrong request was answered ({status}, {text})")


def check_http(url: str, cases: list[Case], comparison: Comparison) -> None:
    """Synchronous, over HTTP: binary and JSON in both directions, compressed, some outputs, many at once."""
    statuses = {"unknown": "404", "invalid": "400", "unimplemented": "501"}
    with triton_http.InferenceServerClient(url, concurrency=4, network_timeout=60.0) as client:
        check_descriptions(client, cases[0], {})
        check_refusals(client, triton_http, cases[0], comparison, statuses)
        for case in cases:
            for binary_in in (True, False):
                for binary_out in (True, False):
                    outputs = [triton_http.InferRequestedOutput(name, binary_data=binary_out) for name in case.outputs]
                    result = client.infer(
                        case.model, inputs(triton_http, case, binary_data=binary_in), outputs=outputs, request_id="r1"
                    )
                    comparison.same(case, result.as_numpy, f"HTTP, binary {binary_in} in, {binary_out} out")
                    assert result.get_response()["id"] == "r1"
            for algorithm in ("gzip", "deflate"):
                result = client.infer(
                    case.model,
                    inputs(triton_http, first(case)),
                    request_compression_algorithm=algorithm,
                    response_compression_algorithm=algorithm,
                )
                comparison.same(first(case), result.as_numpy, f"HTTP, {algorithm}")
            name = list(case.outputs)[-1]
            result = client.infer(
                case.model, inputs(triton_http, case), outputs=[triton_http.InferRequestedOutput(name)]
            )
            comparison.same(Case(case.model, {}, {name: case.outputs[name]}), result.as_numpy, "HTTP, one output")
            assert len(result.get_response()["outputs"]) == 1
            result = client.infer(case.model, inputs(triton_http, case), timeout=30_000_000, priority=1)
            comparison.same(case, result.as_numpy, "HTTP, with parameters")
            assert "deepar_kind" in result.get_response()["parameters"]
            under_way = [client.async_infer(case.model, inputs(triton_http, first(case))) for _ in range(4)]
            for one in under_way:
                comparison.same(first(case), one.get_result(timeout=60).as_numpy, "HTTP, many at once")


def check_grpc(url: str, cases: list[Case], comparison: Comparison) -> None:
    """Synchronous, over gRPC: raw tensors, compressed, some outputs, many at once, streams."""
    statuses = {"unknown": "NOT_FOUND", "invalid": "INVALID_ARGUMENT", "unimplemented": "UNIMPLEMENTED"}
    with triton_grpc.InferenceServerClient(url) as client:
        check_descriptions(client, cases[0], {"as_json": True})
        check_refusals(client, triton_grpc, cases[0], comparison, statuses)
        for case in cases:
            result = client.infer(case.model, inputs(triton_grpc, case), request_id="r2", client_timeout=60)
            comparison.same(case, result.as_numpy, "gRPC")
            assert result.get_response().id == "r2"
            for algorithm in ("gzip", "deflate"):
                result = client.infer(case.model, inputs(triton_grpc, first(case)), compression_algorithm=algorithm)
                comparison.same(first(case), result.as_numpy, f"gRPC, {algorithm}")
            name = list(case.outputs)[-1]
            result = client.infer(
                case.model, inputs(triton_grpc, case), outputs=[triton_grpc.InferRequestedOutput(name)]
            )
            comparison.same(Case(case.model, {}, {name: case.outputs[name]}), result.as_numpy, "gRPC, one output")
            result = client.infer(case.model, inputs(triton_grpc, case), timeout=30_000_000, priority=1)
            assert "deepar_kind" in result.get_response().parameters
            answered: queue.Queue[tuple[Any, Any]] = queue.Queue()

            def keep(result: Any, error: Any, answered: queue.Queue[tuple[Any, Any]] = answered) -> None:
                answered.put((result, error))

            for _ in range(4):
                client.async_infer(case.model, inputs(triton_grpc, first(case)), callback=keep)
            for _ in range(4):
                result, error = answered.get(timeout=60)
                assert error is None, error
                comparison.same(first(case), result.as_numpy, "gRPC, many at once")
            client.start_stream(callback=keep)
            for n in range(STREAMED):
                model = "no-such-model" if n == 5 else case.model
                client.async_stream_infer(model, inputs(triton_grpc, first(case)), request_id=str(n))
            for n in range(STREAMED):
                result, error = answered.get(timeout=60)
                if n == 5:
                    assert "no-such-model" in str(error)
                    continue
                assert error is None, error
                comparison.same(first(case), result.as_numpy, "gRPC, stream")
                assert result.get_response().id == str(n)
                assert result.get_response().parameters["triton_final_response"].bool_param
            client.stop_stream()


def check_placements(url: str, cases: list[Case], comparison: Comparison) -> set[str]:
    """Wherever a request may be computed, the answer is the same; returns the kinds of placement that came about."""
    kinds = set()
    with triton_grpc.InferenceServerClient(url) as client:
        for case in cases:
            for mode, tiers in PLACEMENTS:
                asked = {"placement": tiers, "deepar_mode": mode}
                result = client.infer(case.model, inputs(triton_grpc, case), parameters=asked, client_timeout=60)
                comparison.same(case, result.as_numpy, f"placement {tiers}, {mode}")
                kind = result.get_response().parameters["deepar_kind"].string_param
                allowed = {"device", "edge", "cloud"} - {tiers[1:]} if tiers.startswith("-") else set(tiers.split(","))
                assert set(kind.split("+")) <= allowed, (kind, tiers)
                kinds.add(kind)
    return kinds


async def check_http_aio(url: str, cases: list[Case], comparison: Comparison) -> None:
    """Asynchronous, over HTTP."""
    async with triton_http_aio.InferenceServerClient(url) as client:
        assert await client.is_server_ready()
        case = cases[0]
        check_answers(
            case,
            await client.get_server_metadata(),
            await client.get_model_metadata(case.model),
            await client.get_model_config(case.model),
            await client.get_model_repository_index(),
        )
        for case in cases:
            results = await asyncio.gather(*[client.infer(case.model, inputs(triton_http, case)) for _ in range(3)])
            for result in results:
                comparison.same(case, result.as_numpy, "HTTP, asyncio")


async def check_grpc_aio(url: str, cases: list[Case], comparison: Comparison) -> None:
    """Asynchronous, over gRPC, with a stream."""
    async with triton_grpc_aio.InferenceServerClient(url) as client:
        assert await client.is_server_ready()
        for case in cases:
            results = await asyncio.gather(*[client.infer(case.model, inputs(triton_grpc, case)) for _ in range(3)])
            for result in results:
                comparison.same(case, result.as_numpy, "gRPC, asyncio")

            async def requests(case: Case = case) -> Any:
                for n in range(STREAMED):
                    yield {"model_name": case.model, "inputs": inputs(triton_grpc, first(case)), "request_id": str(n)}

            n = 0
            async for result, error in client.stream_infer(requests()):
                assert error is None, error
                comparison.same(first(case), result.as_numpy, "gRPC, asyncio, stream")
                assert result.get_response().id == str(n)
                n += 1
                if n == STREAMED:
                    break
            assert n == STREAMED


def main() -> None:
    (cases, http, grpc), comparison = given(), Comparison()
    kinds: set[str] = set()
    if http:
        check_http(http, cases, comparison)
        asyncio.run(check_http_aio(http, cases, comparison))
    if grpc:
        check_grpc(grpc, cases, comparison)
        asyncio.run(check_grpc_aio(grpc, cases, comparison))
    if sys.argv[4:] == ["placements"]:
        kinds = check_placements(grpc, cases, comparison)
    print(json.dumps({"answers": comparison.answers, "refusals": comparison.refusals, "kinds": sorted(kinds)}))


if __name__ == "__main__":
    main()
