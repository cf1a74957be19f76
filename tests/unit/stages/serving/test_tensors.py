"""Arrays of the raw tensors of a request."""

from __future__ import annotations

import numpy as np
import pytest

from bus.tensors import DTYPES
from stages.serving.tensors import DATATYPE_OF, DATATYPES, array_of
from stages.serving.values import Fault, ServingError


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_an_array_is_a_view_of_its_bytes(datatype: str) -> None:
    given = np.random.default_rng(3).integers(0, 2, (2, 3, 4)).astype(DATATYPES[datatype])
    array = array_of("x", datatype, [2, 3, 4], given.tobytes())
    assert array.dtype == given.dtype
    assert array.tobytes() == given.tobytes()
    assert array.shape == (2, 3, 4)
    assert not array.flags.owndata


def test_every_real_type_of_a_frame_has_a_datatype() -> None:
    assert set(DATATYPE_OF) == DTYPES - {"complex64"}


@pytest.mark.parametrize(
    ("datatype", "shape", "size_bytes", "reason"),
    [
        ("FP32", [2, 3], 23, r"FP32 of shape \[2, 3\] has 24 bytes, but 23"),
        ("FP32", [2**31 - 1] * 32, 4, "but 4 were sent"),
        ("FP32", [2**31], 4, "at most 2,147,483,647"),
        ("FP32", [10**4000] * 2, 4, "at most 2,147,483,647"),
        ("FP32", [-1, 3], 24, "all positive"),
        ("FP32", [0, 2**62], 0, "all positive"),
        ("FP32", [1] * 33, 4, "at most 32 extents"),
        ("BYTES", [1], 4, "datatype 'BYTES' is none of BOOL"),
        ("float32", [1], 4, "datatype 'float32' is none of"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(datatype: str, shape: list[int], size_bytes: int, reason: str) -> None:
    with pytest.raises(ServingError, match=f"input 'x': .*{reason}") as refused:
        array_of("x", datatype, shape, bytes(size_bytes))
    assert refused.value.fault is Fault.INVALID


def test_a_boolean_is_0_or_1() -> None:
    with pytest.raises(ServingError, match="0 or 1"):
        array_of("x", "BOOL", [3], b"\0\1\2")
