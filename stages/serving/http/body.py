"""Bodies of inference over REST: JSON tensors, and the binary extension, whose tensors follow the JSON as raw bytes.

`orjson` reads a JSON tensor 5 times and writes it 60 times faster than the standard library, which would hold the event loop
of the device for a quarter of a second at 600 kB. It writes null for numbers that are not finite, which JSON lacks.
"""

from __future__ import annotations

import array
import json
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import orjson

from bus.tensors import Array
from stages.serving.tensors import array_of, dtype_of, elements
from stages.serving.terms import request_terms
from stages.serving.values import Fault, InferRequest, InferResponse, ServingError

Json = dict[str, Any]


class OutputForm(NamedTuple):
    """Which outputs the client wants as raw bytes."""

    default: bool = False  # of outputs without a wish of their own
    wishes: Mapping[str, bool] = {}  # output -> whether as raw bytes


class Body(NamedTuple):
    """An encoded answer."""

    parts: list[bytes | memoryview]  # to be sent one after the other
    json_bytes: int | None  # length of the JSON where raw tensors follow; None: JSON alone


def decode_request(
    body: memoryview, json_bytes: int | None, *, model: str, version: str, client: str
) -> tuple[InferRequest, OutputForm]:
    """The request in a body whose first `json_bytes` (None: all) are JSON. Raises `ServingError`."""
    if json_bytes is not None and json_bytes > len(body):
        raise _wrong(f"Inference-Header-Content-Length is {json_bytes:,}, but the body has {len(body):,} bytes")
    value = parsed(body if json_bytes is None else body[:json_bytes])
    inputs = _Inputs(body[len(body) if json_bytes is None else json_bytes :]).read(value)
    parameters = _parameters(value, "the request")
    outputs, form = _wanted(value, parameters)
    request_id = value.get("id", "")
    if not isinstance(request_id, str) or not _is_text(request_id):
        raise _wrong("id must be a string of Unicode characters")
    request = InferRequest(
        model=model,
        version=version,
        id=request_id,
        inputs=inputs,
        outputs=outputs,
        terms=request_terms(parameters),
        client=client,
    )
    return request, form


def encode_response(response: InferResponse, form: OutputForm) -> Body:
    """The answer, in the form that its client wants. `deepar_not_finite` names the outputs with null for such numbers."""
    outputs: list[Json] = []
    parts: list[bytes | memoryview] = [b""]
    not_finite = []
    for info, tensor in response.outputs:
        output: Json = {"name": info.name, "datatype": info.datatype, "shape": tensor.shape}
        if form.wishes.get(info.name, form.default):
            output["parameters"] = {"binary_data_size": tensor.nbytes}
            parts.append(raw_of(tensor))
        else:
            values = np.ascontiguousarray(tensor).reshape(-1)
            if values.dtype.kind == "f":
                values = values.astype(np.float64)  # written with all digits, so that it is exact for every reader
                if not np.isfinite(values).all():
                    not_finite.append(info.name)
            output["data"] = values
        outputs.append(output)
    value: Json = {"model_name": response.model, "model_version": response.version}
    if response.id:
        value["id"] = response.id
    value["parameters"] = dict(response.parameters)
    if not_finite:
        value["parameters"]["deepar_not_finite"] = ",".join(not_finite)
    value["outputs"] = outputs
    parts[0] = json_bytes_of(value)
    return Body(parts, len(parts[0]) if len(parts) > 1 else None)


def json_bytes_of(value: Any) -> bytes:
    """`value` as JSON."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def parsed(text: bytes | memoryview) -> Json:
    """A JSON object. The literals NaN and Infinity are accepted: clients send them. Raises `ServingError`."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        value = _lenient(bytes(text), error.pos)
    if not isinstance(value, dict):
        raise _wrong("the JSON must be an object")
    return value


def _is_text(value: str) -> bool:
    """Whether UTF-8 can carry a string: not if it has half of a surrogate pair, which `_lenient` reads."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lenient(text: bytes, where: int) -> Any:
    wrong = _wrong(f"not JSON, at character {where}; raw tensors need the header Inference-Header-Content-Length")
    if b"NaN" not in text and b"Infinity" not in text:
        raise wrong
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise wrong from None


class _Inputs:
    """Reads the inputs of a request; takes raw tensors from `raw` in turn."""

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw
        self._at = 0

    def read(self, value: Json) -> dict[str, Array]:
        """The tensors by name. Raises `ServingError`."""
        listed = value.get("inputs")
        if not isinstance(listed, list):
            raise _wrong("inputs must be a list of tensors")
        found: dict[str, Array] = {}
        for tensor in listed:
            if not isinstance(tensor, dict) or not isinstance(name := tensor.get("name"), str):
                raise _wrong("an input must be an object with a name")
            if name in found:
                raise _wrong(f"input {name!r:.100} is given twice")
            found[name] = self._array(name, tensor)
        if self._at != len(self._raw):
            raise _wrong(f"{len(self._raw) - self._at:,} bytes follow the last raw tensor")
        return found

    def _array(self, name: str, tensor: Json) -> Array:
        datatype, shape = tensor.get("datatype"), tensor.get("shape")
        if not isinstance(datatype, str):
            raise _wrong(f"input {name!r:.100}: datatype must be a string")
        if not isinstance(shape, list) or not all(type(extent) is int for extent in shape):
            raise _wrong(f"input {name!r:.100}: shape must be a list of integers")
        parameters = tensor.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:
            return array_of_list(name, datatype, shape, tensor.get("data"))
        if "data" in tensor:
            raise _wrong(f"input {name!r:.100}: it has both data and binary_data_size")
        if type(size) is not int or not 0 <= size <= len(self._raw) - self._at:
            left = f"{len(self._raw) - self._at:,} bytes are left after the JSON"
            raise _wrong(f"input {name!r:.100}: binary_data_size {size!r:.30}, but {left}")
        self._at += size
        return array_of(name, datatype, shape, self._raw[self._at - size : self._at])


def _wanted(value: Json, parameters: Json) -> tuple[tuple[str, ...], OutputForm]:
    """The wanted outputs and their form."""
    default = parameters.get("binary_data_output", False)
    if not isinstance(default, bool):
        raise _wrong("parameter 'binary_data_output': expected true or false")
    listed = value.get("outputs")
    if listed is None:
        return (), OutputForm(default)
    if not isinstance(listed, list):
        raise _wrong("outputs must be a list")
    wishes: dict[str, bool] = {}
    for output in listed:
        if not isinstance(output, dict) or not isinstance(name := output.get("name"), str):
            raise _wrong("an output must be an object with a name")
        if name in wishes:
            raise _wrong(f"output {name!r:.100} is requested twice")
        own = _parameters(output, f"output {name!r:.100}")
        if own.get("classification") or own.get("shared_memory_region"):
            raise _wrong(f"output {name!r:.100}: classification and shared memory are not offered")
        wishes[name] = own.get("binary_data", default)
        if not isinstance(wishes[name], bool):
            raise _wrong(f"output {name!r:.100}: parameter 'binary_data': expected true or false")
    return tuple(wishes), OutputForm(default, wishes)


def _parameters(value: Json, of: str) -> Json:
    parameters = value.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise _wrong(f"the parameters of {of} must be an object")
    return parameters


def _wrong(message: str) -> ServingError:
    return ServingError(Fault.INVALID, message)


# --- tensors as lists ------------------------------------------------------------------------------------------------


def array_of_list(name: str, datatype: str, shape: list[int], data: Any) -> Array:
    """The tensor in a list of JSON, nested or flat in C order. Raises `ServingError`."""
    dtype, size = dtype_of(name, datatype), elements(name, shape)
    values = _flat(name, data)
    if len(values) != size:
        raise _wrong(f"input {name!r:.100}: {len(values):,} values, but the shape {shape!s:.80} has {f'{size:,}':.40}")
    try:
        return _typed(values, dtype).reshape(shape)
    except TypeError:
        raise _wrong(f"input {name!r:.100}: a value is not of type {datatype}") from None
    except OverflowError:
        raise _wrong(f"input {name!r:.100}: a value does not fit into {datatype}") from None


def _flat(name: str, data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise _wrong(f"input {name!r:.100}: it needs data, which must be a list, or binary_data_size")
    try:
        while data and isinstance(data[0], list):
            if len({len(row) for row in data}) > 1:
                raise TypeError
            data = list(chain.from_iterable(data))
    except TypeError:
        raise _wrong(f"input {name!r:.100}: data must be a flat list, or nested lists of equal lengths") from None
    return list(data)


def _typed(values: list[Any], dtype: np.dtype[np.generic]) -> Array:
    """The values as an array. `array.array` refuses text, which numpy would convert, and whose size it would multiply.

    Raises `TypeError`, or `OverflowError` where a value does not fit.
    """
    if dtype.kind == "b":
        if set(map(type, values)) - {bool}:
            raise TypeError
        return np.array(values, dtype)
    if dtype.kind == "f":
        wide = np.frombuffer(array.array("d", values))
        with np.errstate(over="ignore"):
            found = wide.astype(dtype)
        if dtype.itemsize < wide.itemsize and bool((np.isinf(found) & np.isfinite(wide)).any()):
            raise OverflowError
        return found
    code = "Q" if dtype.kind == "u" else "q"
    whole = np.frombuffer(array.array(code, values), np.dtype(code))
    limits = np.iinfo(dtype.name)
    if int(whole.max()) > limits.max or int(whole.min()) < limits.min:
        raise OverflowError
    return whole.astype(dtype)


def raw_of(tensor: Array) -> memoryview:
    """The bytes of a tensor, little-endian and in C order; a contiguous one is not copied."""
    if tensor.dtype.byteorder == ">":
        tensor = tensor.astype(tensor.dtype.newbyteorder("<"))
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
