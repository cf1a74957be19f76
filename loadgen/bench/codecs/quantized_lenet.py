"""LeNet in 8-bit integers: a quantised classifier, made from the trained weights that DeePar ships.

Weights are symmetric, of convolutions for each filter; activations have the ranges that the first digits show. It agrees with
the float network on nearly all digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from bus.tensors import Array
from stages.models.files.cache import cache_dir, write_whole
from stages.models.files.graph_builder import GraphBuilder, Quantization
from stages.models.model import KnownFile, Model, read_model
from stages.models.runtime.litert import SegmentRunner
from stages.models.slicer import slice_model
from stages.zoo.networks import LENET, Conv, Dense, MaxPool
from stages.zoo.registry import digits, load_model

NAME = "lenet_int8"
RANGED = 100
"""Digits that give the ranges of the activations; the others are for measuring."""

_INPUT = Quantization([1 / 255], [-128])
_VERSIONS = {"CONV_2D": 3, "MAX_POOL_2D": 2, "FULLY_CONNECTED": 4}
"""The first version of each operator that computes in int8."""


def quantized_lenet() -> Model:
    """The model, written to the cache."""
    data = _built(load_model(LENET.name)).to_bytes()
    path = cache_dir("models") / f"{NAME}.tflite"
    sha256 = write_whole(path, [data], durable=False)
    return read_model(path, KnownFile(name=NAME, sha256=sha256, trusted=True))


def int8_digits() -> list[list[Array]]:
    """The digits that did not give the ranges, as inputs of the model."""
    return [[_stored(image[None], _INPUT)] for image in digits()[0][RANGED:]]


def _stored(values: Array, levels: Quantization) -> Array:
    numbers = np.rint(values / levels.scales[0]) + levels.zero_points[0]
    return np.asarray(np.clip(numbers, -128, 127), np.int8)


def _built(model: Model) -> GraphBuilder:
    graph = GraphBuilder(f"{LENET.title}, in 8-bit integers")
    weights = _weights(model)
    levels, shape = _INPUT, LENET.input_shape
    tensor = graph.input("input", shape, "int8", quantization=levels)
    relu, plain = schema.ActivationFunctionType.RELU, schema.ActivationFunctionType.NONE
    ranges = _ranges(model)
    for position, layer in enumerate(LENET.layers, start=1):
        (made,) = model.manifest.cuts[position].tensors
        options: Any
        constants = partial(_constants, graph, weights, layer.name, levels)
        match layer:
            case MaxPool():
                kind, inputs = "MAX_POOL_2D", [tensor]
                options = schema.Pool2DOptionsT(
                    schema.Padding.VALID, layer.stride, layer.stride, layer.size, layer.size, plain
                )
            case Conv():
                kind, inputs, levels = "CONV_2D", [tensor, *constants(each_filter=True)], _levels(*ranges[position])
                padding = schema.Padding.SAME if layer.same else schema.Padding.VALID
                options = schema.Conv2DOptionsT(padding, layer.stride, layer.stride, relu)
            case Dense():
                kind, inputs = "FULLY_CONNECTED", [tensor, *constants(each_filter=False)]
                levels = _levels(*ranges[position])
                options = schema.FullyConnectedOptionsT(fusedActivationFunction=relu if layer.relu else plain)
            case _:
                raise AssertionError(layer)
        tensor = graph.tensor(layer.name, made.shape, "int8", quantization=levels)
        graph.operator(kind, inputs, [tensor], options, version=_VERSIONS[kind])
    graph.output(tensor)
    return graph


def _constants(
    graph: GraphBuilder, weights: dict[str, Array], layer: str, before: Quantization, *, each_filter: bool
) -> list[int]:
    """Kernel and bias of a layer whose input has the levels `before`."""
    kernel, bias = weights[f"{layer}/kernel"], weights[f"{layer}/bias"]
    axes = tuple(range(1, kernel.ndim)) if each_filter else None
    scale = np.maximum(np.abs(kernel).max(axis=axes, keepdims=True), 1e-9) / 127
    scales = scale.reshape(-1)
    zeros = [0] * len(scales)
    numbers = np.rint(kernel / scale).astype(np.int8)
    steps = scales * before.scales[0]
    return [
        graph.constant(f"{layer}/kernel", numbers, quantization=Quantization(scales.tolist(), zeros)),
        graph.constant(
            f"{layer}/bias",
            np.rint(bias / steps).astype(np.int32),
            quantization=Quantization(steps.tolist(), zeros),
        ),
    ]


def _levels(low: float, high: float) -> Quantization:
    """256 levels from at most 0 to at least 0."""
    scale = (max(high, 0.0) - min(low, 0.0)) / 255
    return Quantization([scale], [round(-128 - min(low, 0.0) / scale)])


def _weights(model: Model) -> dict[str, Array]:
    unpacked = schema.ModelT.InitFromPackedBuf(model.data, 0)
    return {
        tensor.name.decode(): np.frombuffer(bytes(unpacked.buffers[tensor.buffer].data), np.float32).reshape(
            tensor.shape
        )
        for tensor in unpacked.subgraphs[0].tensors
        if tensor.name.endswith((b"/kernel", b"/bias"))
    }


def _ranges(model: Model) -> list[tuple[float, float]]:
    """The smallest and the largest value at each position."""
    values: Sequence[Array] = [image[None] for image in digits()[0][:RANGED]]
    found = [(0.0, 1.0)]
    for position in range(1, model.graph.depth + 1):
        runner = SegmentRunner(slice_model(model, position, position).to_bytes())
        values = [runner.run([value])[0] for value in values]
        found.append((float(min(value.min() for value in values)), float(max(value.max() for value in values))))
    return found
