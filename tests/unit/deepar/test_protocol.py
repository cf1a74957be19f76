"""The client's wire format: inputs are checked before they are sent, and what comes back is read or refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from deepar.protocol import (
    DATATYPES,
    InferenceError,
    InputError,
    ModelInfo,
    TensorInfo,
    check_inputs,
    read_answer,
    read_error,
    read_model,
    write_request,
)

ONE = ModelInfo(
    "lenet", "1", (TensorInfo("image", "float32", (-1, 28, 28, 1)),), (TensorInfo("p", "float32", (-1, 10)),)
)
TWO = ModelInfo("two", "1", (TensorInfo("a", "int8", (1, 4)), TensorInfo("b", "float32", (1, 2, 2))), ())


def test_one_sample_gets_the_dimension_of_samples() -> None:
    array = np.arange(784, dtype=np.float32).reshape(28, 28, 1)
    checked = check_inputs(ONE, array)
    assert checked["image"].shape == (1, 28, 28, 1)
    assert np.array_equal(checked["image"][0], array)


def test_many_samples_stay_as_they_are() -> None:
    array = np.zeros((7, 28, 28, 1), dtype=np.float32)
    assert check_inputs(ONE, array)["image"].shape == (7, 28, 28, 1)


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28), (3, 28, 28)])
def test_dimensions_of_size_1_may_be_left_out(shape: tuple[int, ...]) -> None:
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    checked = check_inputs(ONE, array)["image"]
    assert checked.shape == (math.prod(shape) // 784, 28, 28, 1)
    assert np.array_equal(checked.ravel(), array.ravel())


def test_an_array_that_is_one_sample_is_not_taken_for_several() -> None:
    model = ModelInfo("flat", "1", (TensorInfo("a", "float32", (-1, 1, 4, 1)),), ())
    assert check_inputs(model, np.zeros((1, 4), np.float32))["a"].shape == (1, 1, 4, 1)
    assert check_inputs(model, np.zeros((4,), np.float32))["a"].shape == (1, 1, 4, 1)
    assert check_inputs(model, np.zeros((3, 4), np.float32))["a"].shape == (3, 1, 4, 1)


@pytest.mark.parametrize("given", [2.5, np.float32(2.5), np.array(2.5, np.float32)])
def test_a_scalar_stays_one(given: object) -> None:
    model = ModelInfo("scaled", "1", (TensorInfo("by", "float32", ()),), ())
    checked = check_inputs(model, given)["by"]
    assert (checked.shape, float(checked)) == ((), 2.5)
    with pytest.raises(InputError, match="by of scaled has shape 2"):
        check_inputs(model, [2.5, 3.5])


def test_lists_take_the_models_type() -> None:
    assert check_inputs(TWO, ([[1, 2, 3, 4]], [[[1, 2], [3, 4]]]))["a"].dtype == np.int8


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (ONE, np.zeros((1, 28, 28, 1)), "has dtype float64, expected float32"),
        (ONE, np.zeros((28, 27), np.float32), "has shape 28x27, expected Nx28x28x1"),
        (ONE, np.zeros((2, 3, 28, 28), np.float32), "has shape 2x3x28x28, expected Nx28x28x1"),
        (ONE, np.zeros((0, 28, 28, 1), np.float32), "expected Nx28x28x1"),
        (ONE, {"picture": np.zeros((1, 28, 28, 1), np.float32)}, "takes the inputs image, not picture"),
        (TWO, np.zeros((1, 4), np.int8), "takes the inputs a, b, not ndarray"),
        (TWO, (np.zeros((1, 4), np.int8),), "takes the inputs a, b, not tuple"),
        (TWO, {"a": np.zeros((2, 4), np.int8), "b": np.zeros((3, 2, 2), np.float32)}, "different numbers of samples"),
    ],
)
def test_a_wrong_input_is_named_before_anything_is_sent(model: ModelInfo, given: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_inputs(model, given)


@pytest.mark.parametrize("dtype", DATATYPES.values())
def test_what_is_written_is_read_back_bit_for_bit(dtype: str) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2, (3, 5)).astype(dtype)
    header, parts = write_request({"x": array}, request_id="7", parameters={"timeout": 5})
    told = json.loads(header)
    assert told["parameters"] == {"timeout": 5, "binary_data_output": True}
    told["outputs"], told["model_name"] = told.pop("inputs"), "m"
    answer = read_answer(json.dumps(told).encode(), memoryview(b"".join(parts)))
    assert answer.id == "7"
    assert answer.array.dtype == array.dtype
    assert np.array_equal(answer.array, array)


def test_json_outputs_are_read_too() -> None:
    header = {"model_name": "m", "outputs": [{"name": "y", "datatype": "INT32", "shape": [2, 1], "data": [3, 4]}]}
    assert read_answer(json.dumps(header).encode(), memoryview(b""))["y"].tolist() == [[3], [4]]


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"outputs": [{"name": "y", "datatype": "FP99", "shape": [1], "data": [1]}]}',
        b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1]}]}',
        b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}]}',
    ],
)
def test_an_unreadable_answer_is_an_error(header: bytes) -> None:
    with pytest.raises(InferenceError, match="not readable"):
        read_answer(header, memoryview(b"1234"))


def test_errors_say_whether_the_request_may_be_repeated() -> None:
    busy = read_error(429, b'{"error": "queue full"}', "2")
    assert (str(busy), busy.repeatable, busy.retry_after_s) == ("queue full", True, 2.0)
    wrong = read_error(400, b'{"error": "bad shape"}')
    assert (wrong.status, wrong.repeatable) == (400, False)
    assert read_error(500, b'{"error": "lost", "repeatable": true}').repeatable
    assert str(read_error(502, b"<html>")) == "<html>"


def test_a_models_description() -> None:
    told = {
        "name": "lenet", "versions": ["1"], "parameters": {"labels": ["zero"]},
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 28, 28, 1]}],
        "outputs": [{"name": "p", "datatype": "FP32", "shape": [-1, 10]}],
    }  # fmt: skip
    read = read_model(json.dumps(told).encode())
    assert (read.inputs, read.outputs, read.parameters) == (ONE.inputs, ONE.outputs, {"labels": ["zero"]})
    with pytest.raises(InferenceError, match="not readable"):
        read_model(b'{"name": "x"}')
