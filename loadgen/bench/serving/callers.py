"""Callers: send the same request again and again over one connection, with as little work of their own as possible."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from bus.errors import DeeparError
from bus.tensors import Array
from stages.models.model import Model
from stages.models.runtime.litert import SegmentRunner
from stages.serving.tensors import DATATYPE_OF

RECEIVE_BYTES = 1 << 20
TIMEOUT_S = 30.0


class CallFailedError(DeeparError):
    """A server answered a request of the benchmark with an error, or not at all."""


class Caller(Protocol):
    """One client with one request under way."""

    def call(self) -> None:
        """Send the request and read its answer. Raises `CallFailedError`."""

    def close(self) -> None:
        """Close the connection."""


@dataclass(frozen=True, slots=True)
class Question:
    """The request that every caller of a case sends."""

    model: str
    input_name: str
    array: Array  # one sample
    parameters: dict[str, Any]  # of the request; peers get none


class RestCaller:
    """HTTP over a plain socket, with the tensor as raw bytes or in JSON."""

    def __init__(self, address: tuple[str, int], question: Question, *, binary: bool) -> None:
        tensor: dict[str, Any] = {
            "name": question.input_name,
            "datatype": DATATYPE_OF[question.array.dtype.name],
            "shape": question.array.shape,
        }
        told: dict[str, Any] = {"id": "1", "inputs": [tensor]}
        if question.parameters:
            told["parameters"] = dict(question.parameters)
        if binary:
            tensor["parameters"] = {"binary_data_size": question.array.nbytes}
            told.setdefault("parameters", {})["binary_data_output"] = True
        else:
            tensor["data"] = question.array.ravel().tolist()
        header = json.dumps(told).encode()
        body = header + (question.array.tobytes() if binary else b"")
        length = f"Inference-Header-Content-Length: {len(header)}\r\n" if binary else ""
        self._request = (
            f"POST /v2/models/{question.model}/infer HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n"
            f"Content-Type: application/{'octet-stream' if binary else 'json'}\r\n"
            f"{length}Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        self._socket = socket.create_connection(address, timeout=TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(self) -> None:
        """See `Caller`."""
        try:
            self._socket.sendall(self._request)
            received = self._socket.recv(RECEIVE_BYTES)
            while (end := received.find(b"\r\n\r\n")) < 0:
                received += self._more()
            head = received[:end].lower()
            at = head.find(b"content-length:")
            missing = int(head[at + 15 :].split(b"\r\n", 1)[0]) - (len(received) - end - 4)
            while missing > 0:
                missing -= len(self._more())
        except (OSError, ValueError) as error:
            raise CallFailedError(f"no answer over HTTP: {error}") from None
        if not received.startswith(b"HTTP/1.1 200"):
            raise CallFailedError(f"HTTP answer: {received[:400].decode(errors='replace')}")

    def _more(self) -> bytes:
        part = self._socket.recv(RECEIVE_BYTES)
        if not part:
            raise OSError("the server closed the connection")
        return part

    def close(self) -> None:
        """See `Caller`."""
        self._socket.close()


class GrpcCaller:
    """gRPC with the tensor as raw bytes; the message is packed once."""

    def __init__(self, address: tuple[str, int], question: Question) -> None:
        import grpc  # imported here: an extra

        from stages.serving.grpc.schema import CLASSES

        request = CLASSES["ModelInferRequest"](model_name=question.model, id="1")
        for name, value in question.parameters.items():
            request.parameters[name].string_param = str(value)
        tensor = request.inputs.add(name=question.input_name, datatype=DATATYPE_OF[question.array.dtype.name])
        tensor.shape.extend(question.array.shape)
        request.raw_input_contents.append(question.array.tobytes())
        self._request = request.SerializeToString()
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self._error = grpc.RpcError
        self._channel = grpc.insecure_channel(f"{address[0]}:{address[1]}", options=unlimited)
        self._infer = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def call(self) -> None:
        """See `Caller`."""
        try:
            self._infer(self._request, timeout=TIMEOUT_S)
        except self._error as error:
            raise CallFailedError(f"gRPC answer: {error}") from None

    def close(self) -> None:
        """See `Caller`."""
        self._channel.close()


class InterpreterCaller:
    """The uncut model in this process: what an inference costs without any server."""

    def __init__(self, model: Model, array: Array) -> None:
        self._whole = SegmentRunner(model.source, title=model.name)
        self._inputs = [array]

    def call(self) -> None:
        """See `Caller`."""
        self._whole.run(self._inputs)

    def close(self) -> None:
        """Do nothing, since the model runs in this process."""


MakeCaller = Callable[[], Caller]
