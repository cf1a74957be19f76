"""ModelInfer on the wire: bytes to `InferRequest`, `InferResponse` to bytes.

Raw tensors make up almost all bytes of a message, and protobuf would copy them. So they are cut out of a request before
protobuf parses the rest, and appended to an answer after protobuf wrote the rest: messages may be concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from bus.tensors import Array
from stages.serving.grpc.schema import CLASSES
from stages.serving.tensors import array_of, dtype_of, elements
from stages.serving.terms import request_terms
from stages.serving.values import Fault, InferRequest, InferResponse, ServingError

RAW_INPUT: Final = 7 << 3 | 2  # the tag of ModelInferRequest.raw_input_contents
RAW_OUTPUT: Final = bytes((6 << 3 | 2,))  # of ModelInferResponse.raw_output_contents
STREAMED: Final = bytes((2 << 3 | 2,))  # of ModelStreamInferResponse.infer_response
FIXED_BYTES: Final = {1: 8, 5: 4}  # wire type -> size of the value
FINAL: Final = "triton_final_response"
"""Parameter of the last answer to a request on a stream; without it some clients wait for more answers."""

CONTENTS: Final = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
"""Datatype -> the field of its typed contents; FP16 is sent only raw."""

_Request: Any = CLASSES["ModelInferRequest"]
_Response: Any = CLASSES["ModelInferResponse"]
_StreamResponse: Any = CLASSES["ModelStreamInferResponse"]
_Parameter: Any = CLASSES["InferParameter"]


def malformed(what: str) -> ServingError:
    """The refusal of bytes that are no message of the protocol."""
    return ServingError(Fault.INVALID, f"malformed message: {what}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next byte is."""
    number = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise malformed("a number has more than 10 bytes")


def cut_raw_inputs(data: bytes) -> tuple[bytes, list[memoryview]]:
    """The message without its raw tensors, and views of these. Raises `ServingError` if the bytes are no message."""
    view, raw, rest = memoryview(data), [], []
    at, kept, size = 0, 0, len(data)  # the bytes from `kept` to `at` belong to the rest
    try:
        while at < size:
            start = at
            tag, at = _varint(data, at)
            kind = tag & 7
            if kind == 2:
                length, at = _varint(data, at)
                at += length
            elif kind == 0:
                _, at = _varint(data, at)
            elif kind in FIXED_BYTES:
                at += FIXED_BYTES[kind]
            else:
                raise malformed(f"wire type {kind} is not supported")
            if at > size:
                break
            if tag == RAW_INPUT:
                raw.append(view[at - length : at])
                rest.append(view[kept:start])
                kept = at
    except IndexError:
        at = size + 1
    if at > size:
        raise malformed("it ends within a field")
    rest.append(view[kept:])
    return b"".join(rest), raw


def parse(name: str, data: bytes) -> Any:
    """The message of the class `name`. Raises `ServingError`."""
    try:
        return CLASSES[name].FromString(data)
    except DecodeError:
        raise malformed(f"it is no {name}") from None


def read_request(data: bytes, client: str) -> InferRequest:
    """Decode a ModelInferRequest; tensors are views of `data` where it holds them raw. Raises `ServingError`."""
    rest, raw = cut_raw_inputs(data)
    message = parse("ModelInferRequest", rest)
    parameters = message.parameters
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=_inputs(message.inputs, raw),
        outputs=tuple([_wanted(output) for output in message.outputs]),
        terms=request_terms({name: _value(parameters[name]) for name in parameters} if parameters else {}),
        client=client,
    )


def _inputs(described: Sequence[Any], raw: Sequence[memoryview]) -> dict[str, Array]:
    if raw and len(raw) != len(described):
        raise ServingError(
            Fault.INVALID, f"{len(described)} inputs, but {len(raw)} raw_input_contents: expected one for each input"
        )
    inputs: dict[str, Array] = {}
    for at, one in enumerate(described):
        name = one.name
        if name in inputs:
            raise ServingError(Fault.INVALID, f"input {name!r:.100} is given twice")
        _refuse_shared_memory(f"input {name!r:.100}", one.parameters)
        if raw:
            if one.HasField("contents"):
                raise ServingError(
                    Fault.INVALID, f"input {name!r:.100}: both contents and raw_input_contents are given"
                )
            inputs[name] = array_of(name, one.datatype, one.shape, raw[at])
        else:
            inputs[name] = _typed(name, one)
    return inputs


def _typed(name: str, one: Any) -> Array:
    """The array of an input with typed contents."""
    dtype, count = dtype_of(name, one.datatype), elements(name, one.shape)
    field = CONTENTS.get(one.datatype)
    if field is None:
        raise ServingError(Fault.INVALID, f"input {name!r}: {one.datatype} is accepted in raw_input_contents only")
    values = getattr(one.contents, field)
    if len(values) != count or len(one.contents.ListFields()) > 1:
        raise ServingError(
            Fault.INVALID,
            f"input {name!r}: {count:,} values for the shape {list(one.shape)} expected in {field} alone, "
            f"got {len(values):,}",
        )
    array = np.array(values)
    converted = array.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(converted, array):
        raise ServingError(Fault.INVALID, f"input {name!r}: a value does not fit into {one.datatype}")
    return converted.reshape(tuple(one.shape))


def _wanted(output: Any) -> str:
    name: str = output.name
    _refuse_shared_memory(f"output {name!r:.100}", output.parameters)
    if "classification" in output.parameters:
        raise ServingError(
            Fault.NOT_IMPLEMENTED, f"output {name!r:.100}: classification is not supported; rank the scores yourself"
        )
    return name


def _refuse_shared_memory(what: str, parameters: Mapping[str, Any]) -> None:
    if parameters and "shared_memory_region" in parameters:
        raise ServingError(
            Fault.NOT_IMPLEMENTED, f"{what}: shared memory is not supported; send the tensor in the message"
        )


def _value(parameter: Any) -> object:
    choice = parameter.WhichOneof("value")
    return None if choice is None else getattr(parameter, choice)


def _parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of parameters as messages: booleans, whole numbers, other numbers and text."""
    messages = {}
    for name, value in values.items():
        if isinstance(value, bool):
            messages[name] = _Parameter(bool_param=value)
        elif isinstance(value, int):
            messages[name] = _Parameter(int64_param=value)
        elif isinstance(value, float):
            messages[name] = _Parameter(double_param=value)
        else:
            messages[name] = _Parameter(string_param=str(value))
    return messages


def _length(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _response_parts(response: InferResponse, also: Mapping[str, Any]) -> list[bytes | memoryview]:
    """A ModelInferResponse in pieces; its tensors are raw, in the order of the outputs."""
    head = _Response(
        model_name=response.model,
        model_version=response.version,
        id=response.id,
        parameters=_parameters({**response.parameters, **also}),
        outputs=[
            {"name": info.name, "datatype": info.datatype, "shape": array.shape} for info, array in response.outputs
        ],
    )
    parts: list[bytes | memoryview] = [head.SerializeToString()]
    for _, array in response.outputs:
        raw = _raw(array)
        parts += (RAW_OUTPUT, _length(raw.nbytes), raw)
    return parts


def _raw(array: Array) -> memoryview:
    """The bytes of a tensor, little-endian and in C order."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_response(response: InferResponse) -> bytes:
    """A ModelInferResponse."""
    return b"".join(_response_parts(response, {}))


def write_streamed(response: InferResponse) -> bytes:
    """A ModelStreamInferResponse that is the last answer to its request."""
    parts = _response_parts(response, {FINAL: True})
    size = sum(len(part) for part in parts)
    return b"".join((STREAMED, _length(size), *parts))


def write_stream_error(error: ServingError, request_id: str, model: str) -> bytes:
    """A ModelStreamInferResponse that refuses one request of a stream, which goes on."""
    told = {FINAL: True, "deepar_status": error.fault.grpc, "deepar_repeatable": error.repeatable}
    answer = {"id": request_id, "model_name": model, "parameters": _parameters(told)}
    text = f"[{error.fault.grpc}] {error.for_client}"  # some clients show nothing else
    encoded: bytes = _StreamResponse(error_message=text, infer_response=answer).SerializeToString()
    return encoded
