"""The wire format of the Open Inference Protocol with its binary extension, for the client.

A request and an answer are a JSON header followed by the bytes of the tensors, in the order in which the header names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DATATYPES = {
    "BOOL": "bool", "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
"""The protocol's names of the element types, and numpy's."""
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
REPEATABLE_STATUS = frozenset({408, 429, 499, 503})
LENGTH_BYTES = 4
"""In a message of a stream, the length of the JSON header comes first: 4 bytes, big-endian."""


class InferenceError(Exception):
    """The endpoint refused or could not answer a request."""

    def __init__(self, message: str, status: int = 0, *, repeatable: bool = False, retry_after_s: float | None = None):
        super().__init__(message)
        self.status = status  # HTTP status; 0 if the endpoint did not answer
        self.repeatable = repeatable  # whether the same request may be sent again
        self.retry_after_s = retry_after_s  # how long the endpoint asks to wait before that


class InputError(ValueError):
    """An input has a wrong name, type or shape; nothing was sent."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or an output of a model."""

    name: str
    dtype: str  # numpy's name, like "float32"
    shape: tuple[int, ...]  # of one sample; -1 where any size fits


@dataclass(frozen=True)
class ModelInfo:
    """What the endpoint says of a model."""

    name: str
    version: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)  # labels, mean, std, ... where the model has metadata


@dataclass(frozen=True)
class Answer:
    """The outputs of one request, and how DeePar computed them."""

    model: str
    id: str
    outputs: Mapping[str, Array]  # by name, in the model's order; the first dimension counts the samples
    parameters: Mapping[str, Any]  # `deepar_kind`, `deepar_edge`, `deepar_cuts`, predicted and measured parts, attempt

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]

    @property
    def array(self) -> Array:
        """The output of a model that has one. Raises ValueError for a model with several."""
        if len(self.outputs) != 1:
            raise ValueError(f"{self.model} has the outputs {', '.join(self.outputs)}: choose one by its name")
        return next(iter(self.outputs.values()))


def read_model(body: bytes) -> ModelInfo:
    """A model's metadata. Raises `InferenceError`."""
    try:
        told = json.loads(body)
        versions = told.get("versions") or [""]
        return ModelInfo(
            told["name"],
            str(versions[0]),
            tuple(_tensor(one) for one in told["inputs"]),
            tuple(_tensor(one) for one in told["outputs"]),
            told.get("parameters") or {},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InferenceError(f"the endpoint's description of the model is not readable: {error!r}") from None


def _tensor(told: dict[str, Any]) -> TensorInfo:
    return TensorInfo(told["name"], DATATYPES[told["datatype"]], tuple(int(size) for size in told["shape"]))


def check_inputs(model: ModelInfo, given: Any) -> dict[str, Array]:
    """The inputs by name, checked against the model. Raises `InputError`.

    `given` is one array for a model with one input, a sequence in the model's order, or a mapping by name. The first
    dimension of an array counts the samples; an array without it is one sample. Dimensions of size 1 may be left out.
    """
    names = [one.name for one in model.inputs]
    if isinstance(given, Mapping):
        arrays = dict(given)
    elif isinstance(given, list | tuple) and len(names) > 1:
        arrays = dict(zip(names, given, strict=False)) if len(given) == len(names) else {}
    elif len(names) == 1:
        arrays = {names[0]: given}
    else:
        arrays = {}
    if set(arrays) != set(names):
        found = ", ".join(map(str, arrays)) if arrays else type(given).__name__
        raise InputError(f"{model.name} takes the inputs {', '.join(names)}, not {found}")
    checked = {one.name: _checked(model.name, one, arrays[one.name]) for one in model.inputs}
    counts = {
        array.shape[0] // max(1, one.shape[0])
        for one, array in zip(model.inputs, checked.values(), strict=True)
        if one.shape
    }
    if len(counts) > 1:
        raise InputError(f"the inputs of {model.name} have different numbers of samples: {sorted(counts)}")
    return checked


def _checked(model: str, info: TensorInfo, given: Any) -> Array:
    array = given if isinstance(given, np.ndarray) else np.asarray(given, dtype=info.dtype)
    if array.dtype != np.dtype(info.dtype):
        raise InputError(
            f"input {info.name} of {model} has dtype {array.dtype}, expected {info.dtype}: "
            f"pass array.astype({info.dtype!r}) if that is what you mean"
        )
    rest = info.shape[1:]
    if info.shape[:1] in ((1,), (-1,)):
        array = _completed(array, rest)
    count = max(1, info.shape[0]) if info.shape else 1
    if (
        array.ndim != len(info.shape)
        or not _fits(array.shape[1:], rest)
        or (array.shape and (not array.shape[0] or array.shape[0] % count))
    ):
        wanted = "x".join(["N", *("any" if size < 0 else str(size) for size in rest)])
        have = "x".join(map(str, array.shape)) or "no dimensions"
        raise InputError(f"input {info.name} of {model} has shape {have}, expected {wanted} (N samples)")
    return np.asarray(array, order="C")  # `ascontiguousarray` would give a scalar a dimension


def _completed(array: Array, sample: Sequence[int]) -> Array:
    """`array` with the dimension of the samples, and with the dimensions of size 1 of each sample that were left out."""
    if array.ndim == len(sample) + 1 or not sample:
        return array
    ones = [axis for axis, size in enumerate(sample, start=1) if size == 1]
    for left_out in ([0], ones, [0, *ones]):
        if array.ndim + len(left_out) == len(sample) + 1:
            full = np.expand_dims(array, tuple(left_out))
            if _fits(full.shape[1:], sample):
                return full
    return array


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, size) for size, want in zip(shape, wanted, strict=True))


def write_request(
    inputs: Mapping[str, Array], *, request_id: str, outputs: Sequence[str] = (), parameters: Mapping[str, Any]
) -> tuple[bytes, list[memoryview]]:
    """The JSON header of a request, and the bytes of its tensors."""
    header: dict[str, Any] = {
        "id": request_id,
        "inputs": [
            {
                "name": name,
                "datatype": _NAMES[array.dtype.name],
                "shape": array.shape,
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in inputs.items()
        ],
        "parameters": {**parameters, "binary_data_output": True},
    }
    if outputs:
        header["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return text, [memoryview(array.tobytes()) for array in inputs.values()]


def read_answer(header: bytes | memoryview, data: memoryview) -> Answer:
    """An answer from its JSON header and the bytes after it. Raises `InferenceError`.

    The arrays are views of `data` and cannot be written.
    """
    try:
        told = json.loads(bytes(header))
        if "error" in told:
            raise InferenceError(str(told["error"]), repeatable=told.get("repeatable") is True)
        outputs: dict[str, Array] = {}
        at = 0
        for one in told["outputs"]:
            dtype = np.dtype(DATATYPES[one["datatype"]])
            size = (one.get("parameters") or {}).get("binary_data_size")
            if size is None:
                array = np.array(one["data"], dtype=dtype)
            else:
                array = np.frombuffer(data[at : at + int(size)], dtype=dtype)
                at += int(size)
            outputs[one["name"]] = array.reshape([int(extent) for extent in one["shape"]])
        return Answer(told.get("model_name", ""), str(told.get("id", "")), outputs, told.get("parameters") or {})
    except InferenceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InferenceError(f"the endpoint's answer is not readable: {error!r}") from None


def read_error(status: int, body: bytes, retry_after: str | None = None) -> InferenceError:
    """The error that an answer with this HTTP status stands for."""
    repeatable = status in REPEATABLE_STATUS
    try:
        told = json.loads(body)
        message = str(told["error"])
        if isinstance(told.get("repeatable"), bool):
            repeatable = told["repeatable"]
    except (ValueError, KeyError, TypeError, AttributeError):
        message = body[:200].decode(errors="replace").strip() or f"HTTP status {status}"
    retry_after_s = float(retry_after) if retry_after and retry_after.isdigit() else None
    return InferenceError(message, status, repeatable=repeatable, retry_after_s=retry_after_s)
