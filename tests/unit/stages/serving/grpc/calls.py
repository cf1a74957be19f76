"""A small client for the tests: calls by name with messages or raw bytes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from bus.tensors import Array
from stages.serving.grpc.endpoint import grpc_endpoint
from stages.serving.grpc.schema import CLASSES
from stages.serving.grpc.service import PATH
from stages.serving.limits import Admission, ServingLimits
from stages.serving.security import Listening
from stages.serving.tensors import DATATYPE_OF
from tests.unit.stages.serving.fake_inference import FakeInference

LIMITS = ServingLimits(body_bytes=1 << 20)


class Client:
    """Calls an endpoint; answers are messages."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    async def call(self, name: str, message: Any = b"", **how: Any) -> Any:
        """One unary call, with a message or with bytes."""
        data = message if isinstance(message, bytes) else message.SerializeToString()
        return CLASSES[f"{name}Response"].FromString(await self.channel.unary_unary(PATH + name)(data, **how))

    def stream(self, **how: Any) -> Any:
        """A stream of ModelStreamInfer: bytes in, bytes out."""
        return self.channel.stream_stream(f"{PATH}ModelStreamInfer")(**how)


@contextlib.asynccontextmanager
async def serving(
    inference: FakeInference, *, tokens: tuple[str, ...] = (), limits: ServingLimits = LIMITS
) -> AsyncIterator[Client]:
    """A client of an endpoint over `inference`."""
    listening = Listening(host="127.0.0.1", port=0, tokens=tokens)
    async with (
        grpc_endpoint(inference, listening, Admission(limits)) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Client(channel)


def infer_request(**fields: Any) -> Any:
    """A ModelInferRequest for the model `double`."""
    return CLASSES["ModelInferRequest"](**({"model_name": "double"} | fields))


def raw_request(*arrays: Array, names: Sequence[str] = ("x", "x2", "x3"), **fields: Any) -> Any:
    """A request with raw tensors."""
    inputs = [
        {"name": name, "datatype": DATATYPE_OF[array.dtype.name], "shape": array.shape}
        for name, array in zip(names, arrays, strict=False)
    ]
    return infer_request(inputs=inputs, raw_input_contents=[array.tobytes() for array in arrays], **fields)


def parameters(**values: Any) -> dict[str, Any]:
    """Parameters as messages, each in the field of its type."""
    fields = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return {name: CLASSES["InferParameter"](**{fields[type(value)]: value}) for name, value in values.items()}
