"""The gRPC endpoint over a fake `Inference`, through a real connection."""

from __future__ import annotations

import asyncio
import builtins
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bus.errors import ConfigError
from bus.tensors import Array
from stages.serving.checking import MAX_SAMPLES
from stages.serving.grpc.endpoint import grpc_endpoint
from stages.serving.grpc.schema import CLASSES
from stages.serving.grpc.service import MAX_STREAM_REQUESTS, client_of
from stages.serving.limits import Admission
from stages.serving.security import Listening
from stages.serving.values import Fault, InferRequest, ServingError
from tests.secure_kafka import make_authority, make_broker_certificate
from tests.unit.stages.serving.fake_inference import FakeInference, tensor
from tests.unit.stages.serving.grpc.calls import LIMITS, Client, infer_request, parameters, raw_request, serving

ONES = np.ones((1, 4), np.float32)
INTERNAL = "internal error; the log of the device has it"


async def status_of(call: Any) -> tuple[str, str, dict[str, str]]:
    """The status, text and trailers that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    error = refused.value
    return error.code().name, error.details() or "", dict(error.trailing_metadata())


async def answers(stream: Any, count: int) -> list[Any]:
    return [CLASSES["ModelStreamInferResponse"].FromString(await stream.read()) for _ in range(count)]


async def test_health_and_descriptions() -> None:
    inference = FakeInference()
    named = CLASSES["ModelReadyRequest"](name="double")
    async with serving(inference) as client:
        assert (await client.call("ServerLive")).live
        assert (await client.call("ServerReady")).ready
        assert (await client.call("ModelReady", named)).ready
        assert not (await client.call("ModelReady", CLASSES["ModelReadyRequest"](name="other"))).ready
        assert (await client.call("ServerMetadata")).name == "deepar"
        metadata = await client.call("ModelMetadata", named)
        assert [(one.name, one.datatype, list(one.shape)) for one in metadata.inputs] == [("x", "FP32", [-1, 4])]
        config = (await client.call("ModelConfig", named)).config
        assert (config.name, config.max_batch_size) == ("double", MAX_SAMPLES)
        assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [("x", 11, [4])]
        (entry,) = (await client.call("RepositoryIndex")).models
        assert (entry.name, entry.version, entry.state) == ("double", "1", "READY")
        inference.is_ready = inference.is_live = False
        assert not (await client.call("ServerLive")).live
        assert not (await client.call("ServerReady")).ready
        assert not (await client.call("ModelReady", named)).ready
        assert not (await client.call("RepositoryIndex", CLASSES["RepositoryIndexRequest"](ready=True))).models


async def test_statistics_of_one_model_and_of_all() -> None:
    async with serving(FakeInference()) as client:
        for _ in range(3):
            await client.call("ModelInfer", raw_request(ONES))
        for asked in ({}, {"name": "double"}, {"name": "double", "version": "1"}):
            (stats,) = (await client.call("ModelStatistics", CLASSES["ModelStatisticsRequest"](**asked))).model_stats
            assert (stats.name, stats.inference_count, stats.inference_stats.success.ns) == ("double", 3, 3000)
        unknown = CLASSES["ModelStatisticsRequest"](name="double", version="2")
        assert (await status_of(client.call("ModelStatistics", unknown)))[0] == "NOT_FOUND"


async def test_an_inference_returns_its_tensors_bit_by_bit() -> None:
    infos = (tensor("x", (1, 4)), tensor("x2", (1, 2, 2), "int8"), tensor("x3", (1, 3), "bool"))
    arrays = (
        np.array([[1, np.nan, np.inf, -0.0], [2, 3, 4, 5]], np.float32),
        np.arange(8, dtype=np.int8).reshape(2, 2, 2),
        np.array([[True, False, True]] * 2),
    )
    async with serving(FakeInference(infos)) as client:
        answer = await client.call("ModelInfer", raw_request(*arrays, id="me"))
        assert answer.id == "me"
        assert answer.parameters["deepar_kind"].string_param == "device"
        expected: list[Array] = [arrays[0] * 2, arrays[1] * 2, ~arrays[2]]
        assert list(answer.raw_output_contents) == [array.tobytes() for array in expected]
        assert [list(one.shape) for one in answer.outputs] == [[2, 4], [2, 2, 2], [2, 3]]
        chosen = await client.call("ModelInfer", raw_request(*arrays, outputs=[{"name": "y3"}, {"name": "y"}]))
        assert [one.name for one in chosen.outputs] == ["y3", "y"]


@pytest.mark.parametrize("fault", list(Fault))
async def test_an_error_has_the_status_of_its_fault_and_says_whether_to_repeat(fault: Fault) -> None:
    inference = FakeInference()
    inference.fault = ServingError(fault, "the reason", retry_after_s=1.5)
    async with serving(inference) as client:
        code, text, trailers = await status_of(client.call("ModelInfer", raw_request(ONES)))
    assert code == fault.grpc
    assert text.startswith("the reason")
    assert ("may be repeated" in text) is fault.repeatable
    assert trailers["deepar-repeatable"] == str(fault.repeatable).lower()
    assert trailers["grpc-retry-pushback-ms"] == "1500"


async def test_an_unexpected_error_is_internal_and_ends_nothing() -> None:
    def broken(request: InferRequest) -> Any:
        raise KeyError("secret value")

    async with serving(FakeInference(compute=broken)) as client:
        for _ in range(2):
            code, text, _ = await status_of(client.call("ModelInfer", raw_request(ONES)))
            assert (code, text) == ("INTERNAL", INTERNAL)
        stream = client.stream()
        await stream.write(raw_request(ONES, id="1").SerializeToString())
        (refused,) = await answers(stream, 1)
        assert refused.error_message == f"[INTERNAL] {INTERNAL}"
        assert (await client.call("ServerLive")).live


async def test_a_deadline_of_the_call_is_the_timeout_where_it_is_earlier() -> None:
    inference = FakeInference()
    hurried = raw_request(ONES, parameters=parameters(timeout=5_000_000))
    async with serving(inference) as client:
        await client.call("ModelInfer", raw_request(ONES))
        await client.call("ModelInfer", raw_request(ONES), timeout=60)
        await client.call("ModelInfer", hurried, timeout=60)
        await client.call("ModelInfer", hurried, timeout=4)
    none, far, parameter, call = (request.terms.timeout_s for request in inference.requests)
    assert none is None
    assert far is not None
    assert 30 < far < 61
    assert parameter == 5.0
    assert call is not None
    assert 0 < call < 4.5  # gRPC rounds up


async def test_a_client_that_goes_away_cancels_its_request() -> None:
    inference = FakeInference()
    inference.gate = asyncio.Event()
    async with serving(inference) as client:
        for how in ("cancel", "deadline", "stream"):
            inference.requests.clear()
            inference.cancelled = 0
            if how == "stream":
                stream = client.stream()
                for _ in range(3):
                    await stream.write(raw_request(ONES).SerializeToString())
                await until(lambda: len(inference.requests) == 3)
                stream.cancel()
                await until(lambda: inference.cancelled == 3)
            else:
                timeout = 0.5 if how == "deadline" else None
                call = asyncio.create_task(client.call("ModelInfer", raw_request(ONES), timeout=timeout))
                await until(lambda: len(inference.requests) == 1)
                if how == "cancel":
                    call.cancel()
                await asyncio.wait([call])
                await until(lambda: inference.cancelled == 1)


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


async def test_a_message_over_the_limit_is_refused_also_when_it_is_compressed() -> None:
    inference = FakeInference((tensor("x", (1, LIMITS.body_bytes)),))
    large = raw_request(np.zeros((1, LIMITS.body_bytes), np.float32))
    async with serving(inference) as client:
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate):
            code, _, _ = await status_of(client.call("ModelInfer", large, compression=compression))
            assert code == "RESOURCE_EXHAUSTED"
        assert inference.requests == []
        assert (await client.call("ServerLive", compression=grpc.Compression.Gzip)).live


async def test_a_stream_answers_in_order_with_ids_and_goes_on_after_a_refusal() -> None:
    async with serving(FakeInference()) as client:
        stream = client.stream()
        for n in range(2 * MAX_STREAM_REQUESTS):
            request = raw_request(ONES * n, id=str(n)) if n % 5 else infer_request(id=str(n))
            await stream.write(request.SerializeToString())
        await stream.write(b"\xff\xff")
        await stream.done_writing()
        got = await answers(stream, 2 * MAX_STREAM_REQUESTS + 1)
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() == grpc.StatusCode.OK
    *numbered, malformed = got
    assert [one.infer_response.id for one in numbered] == [str(n) for n in range(2 * MAX_STREAM_REQUESTS)]
    assert all(one.infer_response.parameters["triton_final_response"].bool_param for one in got)
    for n, one in enumerate(numbered):
        if n % 5:
            assert list(one.infer_response.raw_output_contents) == [(ONES * 2 * n).tobytes()]
        else:
            assert one.error_message == "[INVALID_ARGUMENT] input 'x' is missing"
    assert malformed.error_message.startswith("[INVALID_ARGUMENT] malformed message")


async def test_a_stream_reads_no_more_than_a_window_ahead() -> None:
    inference = FakeInference()
    inference.gate = asyncio.Event()
    async with serving(inference) as client:
        stream = client.stream()
        for n in range(3 * MAX_STREAM_REQUESTS):
            await stream.write(raw_request(ONES, id=str(n)).SerializeToString())
        await until(lambda: len(inference.requests) >= MAX_STREAM_REQUESTS)
        for _ in range(20):
            await client.call("ServerLive")
        assert len(inference.requests) <= MAX_STREAM_REQUESTS + 2  # one is awaited, one waits for its place
        inference.gate.set()
        assert len(await answers(stream, 3 * MAX_STREAM_REQUESTS)) == 3 * MAX_STREAM_REQUESTS


async def test_a_token_is_demanded_except_by_probes() -> None:
    inference = FakeInference()
    async with serving(inference, tokens=("another-token", "s3cret-ü")) as client:
        assert (await client.call("ServerLive")).live
        assert (await client.call("ServerReady")).ready
        wrong: list[tuple[tuple[str, str | bytes], ...]] = [
            (),
            (("authorization", "Bearer wrong"),),
            (("authorization", "s3cret"),),
        ]
        for metadata in wrong:
            for call in ("ModelInfer", "ModelMetadata", "RepositoryModelLoad"):
                code, _, _ = await status_of(
                    client.channel.unary_unary(f"/inference.GRPCInferenceService/{call}")(b"", metadata=metadata)
                )
                assert code == "UNAUTHENTICATED"
            stream = client.stream(metadata=metadata)
            assert (await status_of(stream.read()))[0] == "UNAUTHENTICATED"
    assert inference.requests == []
    async with serving(inference, tokens=("another", "s3cret")) as client:
        metadata = (("authorization", "Bearer s3cret"),)
        await client.call("ModelInfer", raw_request(ONES), metadata=metadata)
        stream = client.stream(metadata=metadata)
        await stream.write(raw_request(ONES).SerializeToString())
        assert (await answers(stream, 1))[0].error_message == ""
    assert [request.client for request in inference.requests] == ["token 2", "token 2"]


@pytest.mark.parametrize(
    "call", ["RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryStatus", "LogSettings", "Nonsense"]
)
async def test_what_is_not_supported_is_unimplemented(call: str) -> None:
    async with serving(FakeInference()) as client:
        code, _, _ = await status_of(client.channel.unary_unary(f"/inference.GRPCInferenceService/{call}")(b""))
        assert code == "UNIMPLEMENTED"


async def test_what_a_client_may_have_under_way_is_limited() -> None:
    inference = FakeInference()
    inference.gate = asyncio.Event()
    data = raw_request(ONES).SerializeToString()
    async with serving(inference, limits=replace(LIMITS, client_requests=4, client_bytes=10 * len(data))) as client:
        waiting = [asyncio.create_task(client.call("ModelInfer", raw_request(ONES))) for _ in range(2)]
        stream = client.stream()
        await stream.write(data)
        await until(lambda: len(inference.requests) == 3)
        code, text, trailers = await status_of(client.call("ModelInfer", raw_request(ONES)))
        assert (code, trailers["deepar-repeatable"]) == ("RESOURCE_EXHAUSTED", "true")
        assert "more than 4 requests of this client" in text  # the stream itself is one
        inference.gate.set()
        await asyncio.gather(*waiting)
        large = raw_request(np.ones((40, 4), np.float32))
        code, text, _ = await status_of(client.call("ModelInfer", large))
        assert code == "RESOURCE_EXHAUSTED"
        assert "bytes of this client" in text
        await stream.write(large.SerializeToString())
        answered, refused = await answers(stream, 2)
        assert answered.error_message == ""
        assert "bytes of this client" in refused.error_message
        assert (await client.call("ModelInfer", raw_request(ONES))).model_name == "double"


async def test_a_call_without_a_token_is_refused_before_its_message_is_read() -> None:
    async with serving(FakeInference(), tokens=("s3cret-token-123",)) as client:
        call = client.channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")()
        code, _, _ = await status_of(call)  # no message was sent
        assert code == "UNAUTHENTICATED"


async def test_idle_streams_of_one_client_are_limited() -> None:
    async with serving(FakeInference(), limits=replace(LIMITS, client_requests=2)) as client:
        streams = [client.stream() for _ in range(2)]
        for stream in streams:
            await stream.wait_for_connection()
        await client.call("ServerReady")
        third = client.stream()
        assert (await status_of(third.read()))[0] == "RESOURCE_EXHAUSTED"
        for stream in streams:
            stream.cancel()


async def test_more_calls_than_the_limit_are_refused() -> None:
    inference = FakeInference()
    inference.gate = asyncio.Event()
    async with serving(inference, limits=replace(LIMITS, requests=3)) as client:
        waiting = [asyncio.create_task(client.call("ModelInfer", raw_request(ONES))) for _ in range(3)]
        await until(lambda: len(inference.requests) == 3)
        assert (await status_of(client.call("ModelInfer", raw_request(ONES))))[0] == "RESOURCE_EXHAUSTED"
        inference.gate.set()
        await asyncio.gather(*waiting)


async def test_a_taken_port_is_a_configuration_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listening = Listening(host="127.0.0.1", port=taken.getsockname()[1], flag="--serve-grpc")
        with pytest.raises(ConfigError, match=r"--serve-grpc 127\.0\.0\.1:\d+: cannot listen"):
            async with grpc_endpoint(FakeInference(), listening, Admission(LIMITS)):
                pass


@pytest.mark.parametrize("missing", ["grpc", "google"])
async def test_a_missing_package_is_a_configuration_error_that_names_the_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("stages.serving.grpc.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=f"needs the package {missing}") as refused:
        async with grpc_endpoint(FakeInference(), Listening(host="127.0.0.1", port=0), Admission(LIMITS)):
            pass
    assert "deepar[grpc]" in str(refused.value.remedy)


async def test_tls_with_the_certificate_of_the_endpoint(tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    make_broker_certificate(tmp_path)
    pem = tmp_path / "broker.pem"  # key and certificate
    listening = Listening(host="127.0.0.1", port=0, certificate=pem, key=pem)
    async with grpc_endpoint(FakeInference(), listening, Admission(LIMITS)) as port:
        trusted = grpc.ssl_channel_credentials(authority.read_bytes())
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", trusted) as channel:
            assert (await Client(channel).call("ServerLive")).live
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert (await status_of(Client(channel).call("ServerLive")))[0] == "UNAVAILABLE"


async def test_a_wrong_certificate_is_a_configuration_error(tmp_path: Path) -> None:
    authority = make_authority(tmp_path)
    nothing = tmp_path / "nothing.pem"
    for certificate, key, reason in [
        (authority, None, "must be given together"),
        (nothing, nothing, "No such file"),
        (authority, authority, "--serve-key"),  # it has no key
    ]:
        listening = Listening(host="127.0.0.1", port=0, certificate=certificate, key=key)
        with pytest.raises(ConfigError, match=reason):
            async with grpc_endpoint(FakeInference(), listening, Admission(LIMITS)):
                pass


async def test_an_open_port_without_token_and_tls_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"--serve-grpc 0\.0\.0\.0:0: .* no TLS"):
        async with grpc_endpoint(
            FakeInference(), Listening(host="0.0.0.0", port=0, flag="--serve-grpc"), Admission(LIMITS)
        ):
            pass


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        ("ipv4:127.0.0.1:50000", "127.0.0.1"),
        ("ipv6:%5B2001:db8::1%5D:50000", "2001:db8::1"),
        ("ipv6:[::1]:50000", "::1"),
        ("unix:", "unix:"),
    ],
)
def test_the_client_is_its_address_without_the_port(peer: str, client: str) -> None:
    assert client_of(peer) == client
