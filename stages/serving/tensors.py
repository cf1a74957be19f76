"""Tensors of the Open Inference Protocol: its names of datatypes, and arrays from raw bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bus.tensors import Array
from stages.serving.values import Fault, ServingError

DATATYPES = {
    "BOOL": np.dtype("bool"),
    "UINT8": np.dtype("uint8"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("int8"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""numpy's type of each datatype. The protocol's BYTES and BF16 have no counterpart in a model."""
DATATYPE_OF = {dtype.name: name for name, dtype in DATATYPES.items()}
"""The datatype of each numpy type by its name, such as `float32`."""
MAX_RANK = 32
MAX_EXTENT = 2**31 - 1
"""Largest dimension of a tensor in a model file."""


def array_of(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """The tensor `name` as a read-only view of `data` (little-endian, C order). Raises `ServingError` (`INVALID`)."""
    dtype = dtype_of(name, datatype)
    expected = elements(name, shape) * dtype.itemsize
    if len(data) != expected:
        raise ServingError(
            Fault.INVALID,
            f"input {name!r}: {datatype} of shape {list(shape)} has {expected:,} bytes, but {len(data):,} were sent",
        )
    if datatype == "BOOL" and np.frombuffer(data, np.uint8).max() > 1:
        raise ServingError(Fault.INVALID, f"input {name!r}: a byte of BOOL is 0 or 1")
    return np.frombuffer(data, dtype).reshape(tuple(shape))


def dtype_of(name: str, datatype: str) -> np.dtype[np.generic]:
    """numpy's type of the input `name`. Raises `ServingError` (`INVALID`) for a datatype that no model has."""
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        known = ", ".join(DATATYPES)
        raise ServingError(Fault.INVALID, f"input {name!r}: datatype {datatype!r:.40} is none of {known}")
    return dtype


def elements(name: str, shape: Sequence[int]) -> int:
    """How many elements the input `name` has. Raises `ServingError` (`INVALID`) for a shape that no tensor has."""
    if len(shape) > MAX_RANK or not all(1 <= extent <= MAX_EXTENT for extent in shape):
        expected = f"expected at most {MAX_RANK} extents, all positive and at most {MAX_EXTENT:,}"
        raise ServingError(Fault.INVALID, f"input {name!r}: shape {list(shape)!s:.80}: {expected}")
    return math.prod(shape)
