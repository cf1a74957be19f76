"""The calls of `inference.GRPCInferenceService`: decode, ask the port `Inference`, encode; errors become statuses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Final
from urllib.parse import unquote

import grpc
from google.protobuf.json_format import ParseDict

from stages.serving.checking import MAX_SAMPLES
from stages.serving.grpc.schema import CLASSES, CONFIG_DATATYPES
from stages.serving.grpc.wire import parse, read_request, write_response, write_stream_error, write_streamed
from stages.serving.limits import Admission
from stages.serving.metadata import model_config, model_metadata, repository_index, server_metadata
from stages.serving.security import Guard, Listening
from stages.serving.unexpected import internal_error
from stages.serving.values import Fault, Inference, InferRequest, ServingError

PATH: Final = "/inference.GRPCInferenceService/"
MAX_STREAM_REQUESTS: Final = 32
"""Requests of one stream that are under way; beyond it, no more are read from the stream."""
MAX_ID: Final = 1024  # characters
MAX_STATUS: Final = 1024  # characters of a status, which travels in headers of limited size
OPEN: Final = frozenset(("ServerLive", "ServerReady"))
"""Calls without a token, since probes have none."""
UNSUPPORTED: Final = {
    "RepositoryModelLoad": "the models are chosen when the device starts",
    "RepositoryModelUnload": "the models are chosen when the device starts",
    "TraceSetting": "traces are set up by OpenTelemetry's variables",
    "LogSettings": "logs are set up when the device starts",
} | {
    f"{kind}SharedMemory{verb}": "shared memory is not supported; send tensors in the message"
    for kind in ("System", "Cuda")
    for verb in ("Status", "Register", "Unregister")
}
"""Calls of the service that are refused, and why."""

Context = Any  # grpc.aio.ServicerContext; grpcio has no types
Unary = Callable[[bytes, Context, str], Awaitable[bytes]]  # the message, the call, and who asks


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """Finds the handler of a call by its name."""

    def __init__(self, inference: Inference, listening: Listening, admission: Admission) -> None:
        self._inference = inference
        self._guard = Guard(listening)
        self._admission = admission
        described: Mapping[str, Callable[[Any], Mapping[str, Any]]] = {
            "ServerLive": lambda _: {"live": inference.live()},
            "ServerReady": lambda _: {"ready": inference.ready()},
            "ModelReady": lambda asked: {"ready": inference.ready() and self._is_known(asked)},
            "ServerMetadata": lambda _: server_metadata(version("deepar")),
            "ModelMetadata": lambda asked: model_metadata(inference.model(asked.name, asked.version)),
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            "RepositoryIndex": lambda asked: {"models": repository_index(inference, only_ready=asked.ready)},
        }
        calls: dict[str, Unary] = {"ModelInfer": self._infer}
        calls |= {name: self._describe(name, answer) for name, answer in described.items()}
        calls |= {name: _unsupported(name, reason) for name, reason in UNSUPPORTED.items()}
        self._handlers = {
            PATH + name: grpc.unary_unary_rpc_method_handler(self._guarded(name, call)) for name, call in calls.items()
        }
        self._handlers[f"{PATH}ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call; None for an unknown one. A call without a valid token is refused before it is read."""
        method = handler_call_details.method
        handler = self._handlers.get(method)
        if handler is None or method.removeprefix(PATH) in OPEN:
            return handler
        try:
            self._token(handler_call_details.invocation_metadata)
        except ServingError as error:
            return _refusing(error)
        return handler

    def _guarded(self, name: str, call: Unary) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """The call, after a check of the token; its errors become statuses."""

        async def guarded(data: bytes, context: Context) -> bytes:
            try:
                return await call(data, context, "" if name in OPEN else self._client(context))
            except ServingError as error:
                refused = error
            except Exception as error:
                refused = internal_error(name, error)
            await _refuse(context, refused)
            raise AssertionError("abort raises")

        return guarded

    def _client(self, context: Context) -> str:
        """Who calls: the name of the token, or else the address. Raises `ServingError` for a wrong token."""
        return self._token(context.invocation_metadata()) or client_of(context.peer())

    def _token(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The name of the token of a call; empty where none is needed. Raises `ServingError` for a wrong token."""
        given = next((value for key, value in metadata or () if key == "authorization"), "")
        # a page in a browser cannot speak gRPC, so host and origin need no check
        return self._guard.check(authorization=given if isinstance(given, str) else "", host="localhost", origin="")

    def _describe(self, name: str, answer: Callable[[Any], Mapping[str, Any]]) -> Unary:
        response = CLASSES[f"{name}Response"]

        async def describe(data: bytes, context: Context, client: str) -> bytes:
            told = answer(parse(f"{name}Request", data))
            encoded: bytes = ParseDict(told, response(), ignore_unknown_fields=True).SerializeToString()
            return encoded

        return describe

    def _is_known(self, asked: Any) -> bool:
        try:
            self._inference.model(asked.name, asked.version)
        except ServingError:
            return False
        return True

    def _config(self, asked: Any) -> Mapping[str, Any]:
        config = model_config(self._inference.model(asked.name, asked.version), MAX_SAMPLES)
        for tensor in (*config["input"], *config["output"]):
            tensor["data_type"] = CONFIG_DATATYPES[tensor["data_type"]]
        return {"config": config}

    def _statistics(self, asked: Any) -> Mapping[str, Any]:
        if asked.name:
            self._inference.model(asked.name, asked.version)
        return {"model_stats": list(self._inference.statistics(asked.name))}

    async def _infer(self, data: bytes, context: Context, client: str) -> bytes:
        with self._admission.admitted(client, len(data)):
            request = _within_deadline(read_request(data, client), context)
            return write_response(await self._inference.infer(request))

    async def _stream(self, _: Any, context: Context) -> None:
        """Answer the requests of a stream in their order. A refused request does not end the stream."""
        try:
            client = self._client(context)
            with self._admission.admitted(client, 0):
                await self._answer_all(context, client)
        except ServingError as error:
            await _refuse(context, error)

    async def _answer_all(self, context: Context, client: str) -> None:
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(MAX_STREAM_REQUESTS)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._accept(context, client, answers, group))
            while (answer := await answers.get()) is not None:
                await context.write(await answer)

    async def _accept(
        self,
        context: Context,
        client: str,
        answers: asyncio.Queue[asyncio.Task[bytes] | None],
        group: asyncio.TaskGroup,
    ) -> None:
        while (data := await context.read()) is not grpc.aio.EOF:
            await answers.put(group.create_task(self._answer(data, context, client)))
        await answers.put(None)

    async def _answer(self, data: bytes, context: Context, client: str) -> bytes:
        """The answer to one request of a stream, or its refusal."""
        request: InferRequest | None = None
        try:
            with self._admission.admitted(client, len(data)):
                request = read_request(data, client)
                return write_streamed(await self._inference.infer(_within_deadline(request, context)))
        except ServingError as error:
            refused = error
        except Exception as error:
            refused = internal_error("ModelStreamInfer", error)
        request_id, model = ("", "") if request is None else (request.id, request.model)
        return write_stream_error(refused, request_id, model)


def _within_deadline(request: InferRequest, context: Context) -> InferRequest:
    """The request with the deadline of its call as timeout, where that is earlier."""
    if len(request.id) > MAX_ID:
        raise ServingError(Fault.INVALID, f"the id has more than {MAX_ID} characters")
    remaining_s = context.time_remaining()
    if remaining_s is None:
        return request
    if remaining_s <= 0:
        raise ServingError(Fault.DEADLINE, "the deadline of the call is over")
    timeout_s = min(remaining_s, request.terms.timeout_s or remaining_s)
    return replace(request, terms=replace(request.terms, timeout_s=timeout_s))


def client_of(peer: str) -> str:
    """The client's address without its port: of `ipv4:127.0.0.1:50000` it is `127.0.0.1`."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer


def _refusing(error: ServingError) -> Any:
    """A handler that refuses a call without reading its message."""

    async def refuse(_: Any, context: Context) -> None:
        await _refuse(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _unsupported(name: str, reason: str) -> Unary:
    async def refuse(data: bytes, context: Context, client: str) -> bytes:
        raise ServingError(Fault.NOT_IMPLEMENTED, f"{name} is not supported: {reason}")

    return refuse


async def _refuse(context: Context, error: ServingError) -> None:
    """End the call with the error's status. The trailers say whether the request may be sent again, and how soon."""
    trailers = [("deepar-repeatable", "true" if error.repeatable else "false")]
    if error.retry_after_s is not None:
        trailers.append(
            ("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000)))
        )  # known to gRPC's own retries
    await context.abort(getattr(grpc.StatusCode, error.fault.grpc), error.for_client[:MAX_STATUS], tuple(trailers))
