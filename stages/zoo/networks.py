"""The networks of the zoo, layer by layer: the paper's LeNet-5, AlexNet, VGG-16 and DeepFace, and MobileNet.

Each is a chain of convolutions, pools and fully-connected layers (AlexNet also normalises) with fused activations;
the outputs are logits. A layer's name is the name of the tensor it makes. The first fully-connected layer reads a RESHAPE:
where the operator flattens its input itself, GPUs compute wrong numbers. AlexNet is the one-tower form with the paper's
layer names, without dropout, which has no effect at inference. DeepFace is Parkhi et al., "Deep face recognition" (2015),
the paper's reference [1]: the layout of VGG-16 (Simonyan and Zisserman, configuration D) with 2,622 outputs. MobileNet is
the first version (Howard et al., 2017) with width 0.5 on pictures of 128 x 128: a small network for phones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import Any, TypeAlias

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from bus.errors import ConfigError
from bus.tensors import Array
from stages.models.files.flatbuffer_writer import Chunk
from stages.models.files.graph_builder import GraphBuilder

PIECE_VALUES = 1 << 20
"""Number of weight values that are generated and written at a time (4 MiB)."""


@dataclass(frozen=True)
class Conv:
    """A convolution with bias and ReLU."""

    name: str
    filters: int
    size: int
    stride: int = 1
    same: bool = True  # pads so that the picture keeps its size


@dataclass(frozen=True)
class Depthwise:
    """A convolution of each channel by itself, 3 x 3, with bias and ReLU; pads like `Conv.same`."""

    name: str
    stride: int = 1


@dataclass(frozen=True)
class MaxPool:
    """A max-pool over square windows."""

    name: str
    size: int
    stride: int


@dataclass(frozen=True)
class AveragePool:
    """The mean of each channel over the whole picture."""

    name: str


@dataclass(frozen=True)
class Norm:
    """Local response normalisation across channels, with the constants of the AlexNet paper."""

    name: str


@dataclass(frozen=True)
class Dense:
    """A fully-connected layer with bias, with ReLU unless it is the last."""

    name: str
    outputs: int
    relu: bool = True


Layer: TypeAlias = Conv | Depthwise | MaxPool | AveragePool | Norm | Dense


@dataclass(frozen=True)
class Network:
    """A chain of layers on one picture."""

    name: str  # as users write it
    title: str  # as people read it
    input_shape: tuple[int, int, int, int]  # batch, height, width, channels
    layers: tuple[Layer, ...]
    seed: int  # random seed of untrained weights


def _vgg(name: str, title: str, outputs: int, seed: int) -> Network:
    layers: list[Layer] = []
    for block, (filters, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], start=1):
        layers += [Conv(f"conv_{block}_{index}", filters, 3) for index in range(1, count + 1)]
        layers.append(MaxPool(f"maxpool_{block}", 2, 2))
    layers += [Dense("fc_1", 4096), Dense("fc_2", 4096), Dense("fc_3", outputs, relu=False)]
    return Network(name, title, (1, 224, 224, 3), tuple(layers), seed)


def _mobilenet() -> Network:
    layers: list[Layer] = [Conv("conv_1", 16, 3, stride=2)]
    blocks = [(32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), *[(256, 1)] * 5, (512, 2), (512, 1)]
    for index, (filters, stride) in enumerate(blocks, start=2):
        layers += [Depthwise(f"depthwise_{index}", stride), Conv(f"conv_{index}", filters, 1)]
    layers += [AveragePool("averagepool_1"), Dense("fc_1", 1000, relu=False)]
    return Network("mobilenet", "MobileNet 0.5, weights from a seed", (1, 128, 128, 3), tuple(layers), seed=2017)


LENET = Network(
    "lenet",
    "LeNet-5, trained on handwritten digits",
    (1, 28, 28, 1),
    (
        Conv("conv_1", 6, 5),
        MaxPool("maxpool_1", 2, 2),
        Conv("conv_2", 16, 5, same=False),
        MaxPool("maxpool_2", 2, 2),
        Dense("fc_1", 120),
        Dense("fc_2", 84),
        Dense("fc_3", 10, relu=False),
    ),
    seed=1998,
)
ALEXNET = Network(
    "alexnet",
    "AlexNet, one tower, weights from a seed",
    (1, 227, 227, 3),
    (
        Conv("conv_1", 96, 11, stride=4, same=False),
        Norm("norm_1"),
        MaxPool("maxpool_1", 3, 2),
        Conv("conv_2", 256, 5),
        Norm("norm_2"),
        MaxPool("maxpool_2", 3, 2),
        Conv("conv_3", 384, 3),
        Conv("conv_4", 384, 3),
        Conv("conv_5", 256, 3),
        MaxPool("maxpool_3", 3, 2),
        Dense("fc_1", 4096),
        Dense("fc_2", 4096),
        Dense("fc_3", 1000, relu=False),
    ),
    seed=2012,
)
VGG16 = _vgg("vgg16", "VGG-16, weights from a seed", 1000, seed=2014)
DEEPFACE = _vgg("deepface", "DeepFace (VGG-Face layout), weights from a seed", 2622, seed=2015)

MOBILENET = _mobilenet()

NETWORKS: dict[str, Network] = {network.name: network for network in (LENET, ALEXNET, VGG16, DEEPFACE, MOBILENET)}


def _drawn(seed: int, layer: int, shape: Sequence[int], bound: float) -> Iterable[Chunk]:
    """Weights uniform in [-bound, bound), bit-identical on every machine: raw Philox words and exact float arithmetic."""
    words = np.random.Philox(key=(seed << 32) + layer)
    remaining = prod(shape)
    while remaining > 0:
        count = min(PIECE_VALUES, remaining)
        bits = words.random_raw(-(-count // 2)).astype("<u8").view("<u4")[:count]
        unit = (bits >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
        yield (unit * np.float32(bound)).astype("<f4").tobytes()
        remaining -= count


WeightSource: TypeAlias = Callable[[int, str, Sequence[int], int], Iterable[Chunk]]
"""layer index, "kernel" or "bias", shape, fan-in -> float32 little-endian bytes"""


def seeded(seed: int) -> WeightSource:
    """He initialisation (variance 2 / fan-in, so activations keep their size through ReLUs); biases are zero."""

    def source(layer: int, part: str, shape: Sequence[int], fan_in: int) -> Iterable[Chunk]:
        return [bytes(4 * prod(shape))] if part == "bias" else _drawn(seed, layer, shape, sqrt(6.0 / fan_in))

    return source


def trained(weights: Mapping[str, Array], network: Network) -> WeightSource:
    """Weights from arrays named `LAYER/kernel` and `LAYER/bias` in the shapes of the format.

    The returned source raises `ConfigError` if an array is missing or has another shape.
    """

    def source(layer: int, part: str, shape: Sequence[int], fan_in: int) -> Iterable[Chunk]:
        name = f"{network.layers[layer].name}/{part}"
        if name not in weights:
            raise ConfigError(f"the weights lack the array {name}; add it with the shape {tuple(shape)}")
        value = weights[name]
        if value.shape != tuple(shape):
            raise ConfigError(f"{name} has the shape {value.shape}, not {tuple(shape)}")
        return [np.ascontiguousarray(value, "<f4").tobytes()]

    return source


def build(network: Network, source: WeightSource) -> GraphBuilder:
    """A builder of the network's model; weights are generated or read when the model is written."""
    graph = GraphBuilder(network.title)
    shape: tuple[int, ...] = network.input_shape
    tensor = graph.input("input", shape)
    first = tensor

    def parameters(index: int, kernel_shape: Sequence[int], outputs: int, fan_in: int) -> list[int]:
        name = network.layers[index].name
        return [
            graph.weights(
                f"{name}/{part}",
                part_shape,
                "float32",
                partial(source, index, part, part_shape, fan_in),
                4 * prod(part_shape),
            )
            for part, part_shape in (("kernel", tuple(kernel_shape)), ("bias", (outputs,)))
        ]

    relu = schema.ActivationFunctionType.RELU
    plain = schema.ActivationFunctionType.NONE
    for index, layer in enumerate(network.layers):
        inputs = [tensor]
        options: Any
        match layer:
            case Conv():
                fan_in = layer.size * layer.size * shape[3]
                inputs += parameters(index, (layer.filters, layer.size, layer.size, shape[3]), layer.filters, fan_in)
                kind, shape = "CONV_2D", _windowed(shape, layer.size, layer.stride, layer.same, layer.filters)
                padding = schema.Padding.SAME if layer.same else schema.Padding.VALID
                options = schema.Conv2DOptionsT(padding, layer.stride, layer.stride, relu)
            case Depthwise():
                inputs += parameters(index, (1, 3, 3, shape[3]), shape[3], 9)
                kind, shape = "DEPTHWISE_CONV_2D", _windowed(shape, 3, layer.stride, True, shape[3])
                options = schema.DepthwiseConv2DOptionsT(schema.Padding.SAME, layer.stride, layer.stride, 1, relu)
            case AveragePool():
                kind, (height, width) = "AVERAGE_POOL_2D", shape[1:3]
                shape = (shape[0], 1, 1, shape[3])
                options = schema.Pool2DOptionsT(schema.Padding.VALID, width, height, width, height, plain)
            case MaxPool():
                kind, shape = "MAX_POOL_2D", _windowed(shape, layer.size, layer.stride, False, shape[3])
                options = schema.Pool2DOptionsT(
                    schema.Padding.VALID, layer.stride, layer.stride, layer.size, layer.size, plain
                )
            case Norm():
                kind = "LOCAL_RESPONSE_NORMALIZATION"
                options = schema.LocalResponseNormalizationOptionsT(radius=2, bias=2.0, alpha=1e-4, beta=0.75)
            case Dense():
                fan_in = prod(shape[1:])
                if len(shape) > 2:
                    shape = (shape[0], fan_in)
                    inputs = [_flattened(graph, tensor, shape)]
                inputs += parameters(index, (layer.outputs, fan_in), layer.outputs, fan_in)
                kind, shape = "FULLY_CONNECTED", (shape[0], layer.outputs)
                options = schema.FullyConnectedOptionsT(fusedActivationFunction=relu if layer.relu else plain)
        tensor = graph.tensor(layer.name, shape)
        graph.operator(kind, inputs, [tensor], options)
    graph.output(tensor)
    graph.signature("serving_default", {"input": first}, {"logits": tensor})
    return graph


def _flattened(graph: GraphBuilder, picture: int, shape: tuple[int, int]) -> int:
    """The picture as a row of values; -1 leaves the batch open, so that it can be resized."""
    flat = graph.tensor("flatten", shape)
    target = graph.constant("flatten/shape", np.array([-1, shape[1]], np.int32))
    graph.operator("RESHAPE", [picture, target], [flat], schema.ReshapeOptionsT([-1, shape[1]]))
    return flat


def _windowed(shape: tuple[int, ...], size: int, stride: int, same: bool, channels: int) -> tuple[int, ...]:
    """The shape after sliding a window over height and width."""
    pad = 0 if not same else size - 1
    return (shape[0], (shape[1] + pad - size) // stride + 1, (shape[2] + pad - size) // stride + 1, channels)
