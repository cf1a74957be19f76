"""Requests and answers of ModelInfer as bytes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from bus.tensors import Array
from stages.serving.grpc.schema import CLASSES
from stages.serving.grpc.wire import (
    cut_raw_inputs,
    read_request,
    write_response,
    write_stream_error,
    write_streamed,
)
from stages.serving.tensors import DATATYPES
from stages.serving.values import Fault, InferResponse, ServingError
from tests.unit.stages.serving.fake_inference import tensor
from tests.unit.stages.serving.grpc.calls import infer_request, parameters, raw_request

TYPED: dict[str, tuple[str, list[Any]]] = {
    "BOOL": ("bool_contents", [True, False, True]),
    "UINT8": ("uint_contents", [0, 7, 255]),
    "UINT16": ("uint_contents", [0, 7, 65535]),
    "UINT32": ("uint_contents", [0, 7, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 7, 2**64 - 1]),
    "INT8": ("int_contents", [-128, 0, 127]),
    "INT16": ("int_contents", [-32768, 0, 32767]),
    "INT32": ("int_contents", [-(2**31), 0, 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 0, 2**63 - 1]),
    "FP32": ("fp32_contents", [0.5, float("inf"), -3.25]),
    "FP64": ("fp64_contents", [0.1, 1e300, -0.0]),
}


def typed(datatype: str, field: str, values: list[Any], shape: tuple[int, ...] = (1, 3)) -> bytes:
    described = {"name": "x", "datatype": datatype, "shape": shape, "contents": {field: values}}
    encoded: bytes = infer_request(inputs=[described]).SerializeToString()
    return encoded


@pytest.mark.parametrize("datatype", sorted(TYPED))
def test_typed_contents_become_an_array(datatype: str) -> None:
    field, values = TYPED[datatype]
    array = read_request(typed(datatype, field, values), "me").inputs["x"]
    assert array.dtype == DATATYPES[datatype]
    assert array.tolist() == [values]


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_a_raw_tensor_is_a_view_of_the_message(datatype: str) -> None:
    given = np.arange(6).reshape(2, 3).astype(DATATYPES[datatype])
    read = read_request(raw_request(given, id="7").SerializeToString(), "me")
    assert (read.model, read.version, read.id, read.client, read.outputs) == ("double", "", "7", "me", ())
    assert read.inputs["x"].tobytes() == given.tobytes()
    assert read.inputs["x"].shape == (2, 3)
    assert not read.inputs["x"].flags.owndata


def test_outputs_version_and_parameters_are_read() -> None:
    request = raw_request(
        np.zeros((1, 4), np.float32),
        model_version="1",
        outputs=[{"name": "b"}, {"name": "a"}],
        parameters=parameters(
            timeout=2_000_000, placement="-cloud", sequence_id="s", sequence_start=True, min_agreement=0.5
        ),
    )
    read = read_request(request.SerializeToString(), "")
    assert (read.version, read.outputs) == ("1", ("b", "a"))
    assert (read.terms.timeout_s, read.terms.session, read.terms.session_start) == (2.0, "s", True)
    assert read.terms.min_agreement == 0.5


@pytest.mark.parametrize(
    ("request_fields", "reason"),
    [
        (
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}], "raw_input_contents": [b"", b""]},
            "2 raw_input",
        ),
        ({"raw_input_contents": [b"1234"]}, "0 inputs, but 1 raw_input_contents"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}], "raw_input_contents": [b"1234567"]}, "8 bytes"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}]}, "2 values .* in fp32_contents alone, got 0"),
        (
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "contents": {"int_contents": [1]}}]},
            "in fp32_contents alone, got 0",
        ),
        (
            {
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "contents": {"fp32_contents": [1]}}],
                "raw_input_contents": [b"1234"],
            },
            "both contents and raw_input_contents",
        ),
        (
            {"inputs": [{"name": "x", "datatype": "INT8", "shape": [1], "contents": {"int_contents": [128]}}]},
            "does not fit into INT8",
        ),
        (
            {"inputs": [{"name": "x", "datatype": "UINT16", "shape": [1], "contents": {"uint_contents": [65536]}}]},
            "does not fit into UINT16",
        ),
        ({"inputs": [{"name": "x", "datatype": "FP16", "shape": [1]}]}, "FP16 is accepted in raw_input_contents only"),
        ({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1]}]}, "datatype 'BYTES'"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}]}, "all positive"),
        (
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "contents": {"fp32_contents": [1]}}] * 2},
            "twice",
        ),
        ({"parameters": parameters(timeout=-5)}, "parameter 'timeout'"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(request_fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ServingError, match=reason) as refused:
        read_request(infer_request(**request_fields).SerializeToString(), "")
    assert refused.value.fault is Fault.INVALID


@pytest.mark.parametrize(
    "request_fields",
    [
        {
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": [1], "parameters": parameters(shared_memory_region="region")}
            ]
        },
        {"outputs": [{"name": "y", "parameters": parameters(shared_memory_region="region")}]},
        {"outputs": [{"name": "y", "parameters": parameters(classification=3)}]},
    ],
)
def test_what_is_not_supported_is_refused_as_such(request_fields: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match="is not supported") as refused:
        read_request(infer_request(**request_fields).SerializeToString(), "")
    assert refused.value.fault is Fault.NOT_IMPLEMENTED


def test_cutting_raw_tensors_agrees_with_protobuf() -> None:
    """Whatever the order of the fields: protobuf reads the same from the two parts as from the whole, or from neither."""
    random_numbers = random.Random(15)
    message = raw_request(
        np.ones((1, 4), np.float32), np.ones((2, 300), np.int8), id="abc", parameters=parameters(priority=3, b=True)
    ).SerializeToString()
    agreed = 0
    for _ in range(5_000):
        data = bytearray(message)
        for _ in range(random_numbers.randrange(3)):
            at = random_numbers.randrange(len(data))
            change = random_numbers.randrange(4)
            if change == 0:
                data[at] = random_numbers.randrange(256)
            elif change == 1:
                del data[at : at + random_numbers.randrange(1, 9)]
            elif change == 2:
                data[at:at] = random_numbers.randbytes(3)
            else:
                data = data[at:] + data[:at]
            data = data or bytearray(b"\0")
        whole: Any
        try:
            whole = CLASSES["ModelInferRequest"].FromString(bytes(data))
        except DecodeError:
            whole = None
        try:
            rest, raw = cut_raw_inputs(bytes(data))
            parts = CLASSES["ModelInferRequest"].FromString(rest)
            assert not parts.raw_input_contents
            parts.raw_input_contents.extend(bytes(one) for one in raw)
        except (ServingError, DecodeError):
            parts = None
        if parts is not None:
            assert whole == parts
            agreed += 1
        elif whole is not None:
            assert bytes(data) != b""  # a group of an unknown field: protobuf skips it, the endpoint refuses it
            assert any(byte & 7 in (3, 4) for byte in data)
    assert agreed > 1_000


def response(*arrays: Array) -> InferResponse:
    infos = [tensor(f"y{n}", array.shape, array.dtype.name) for n, array in enumerate(arrays)]
    return InferResponse(
        model="double",
        version="1",
        id="9",
        outputs=list(zip(infos, arrays, strict=True)),
        parameters={"deepar_kind": "edge", "deepar_attempt": 2, "deepar_delay_s": 0.5, "deepar_late": True},
    )


def test_an_answer_holds_every_tensor_and_parameter() -> None:
    arrays = (
        np.arange(1_000, dtype=np.float32).reshape(10, 100),
        np.array([[True, False]]),
        np.array(3.5),
    )
    strided = np.arange(12, dtype=">i4").reshape(3, 4).T
    read = CLASSES["ModelInferResponse"].FromString(write_response(response(*arrays, strided)))
    assert (read.model_name, read.model_version, read.id) == ("double", "1", "9")
    assert [(one.name, one.datatype, list(one.shape)) for one in read.outputs] == [
        ("y0", "FP32", [10, 100]),
        ("y1", "BOOL", [1, 2]),
        ("y2", "FP64", []),
        ("y3", "INT32", [4, 3]),
    ]
    assert list(read.raw_output_contents) == [
        *(array.tobytes() for array in arrays),
        np.ascontiguousarray(strided).astype("<i4").tobytes(),
    ]
    told = read.parameters
    assert told["deepar_kind"].string_param == "edge"
    assert told["deepar_attempt"].int64_param == 2
    assert told["deepar_delay_s"].double_param == 0.5
    assert told["deepar_late"].bool_param
    assert "triton_final_response" not in told


@pytest.mark.parametrize("size", [1, 100, 20_000])
def test_an_answer_on_a_stream_wraps_the_answer_and_is_final(size: int) -> None:
    read = CLASSES["ModelStreamInferResponse"].FromString(write_streamed(response(np.ones((1, size), np.float32))))
    assert read.error_message == ""
    assert read.infer_response.id == "9"
    assert read.infer_response.parameters["triton_final_response"].bool_param
    assert len(read.infer_response.raw_output_contents[0]) == 4 * size


def test_a_refusal_on_a_stream_names_its_request_and_whether_it_may_be_repeated() -> None:
    error = ServingError(Fault.UNAVAILABLE, "the edge was lost")
    read = CLASSES["ModelStreamInferResponse"].FromString(write_stream_error(error, "4", "double"))
    assert read.error_message == "[UNAVAILABLE] the edge was lost; the request may be repeated"
    told = read.infer_response.parameters
    assert read.infer_response.id == "4"
    assert told["triton_final_response"].bool_param
    assert told["deepar_status"].string_param == "UNAVAILABLE"
    assert told["deepar_repeatable"].bool_param
