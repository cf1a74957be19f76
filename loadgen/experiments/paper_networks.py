"""Cost tables of the paper's four networks: operations and bytes per layer, computed from the architectures.

AlexNet (Krizhevsky et al. 2012, one tower, 227 x 227), VGG-16 (Simonyan and Zisserman 2014, configuration D), DeepFace (the
paper's reference [1], Parkhi et al. 2015: VGG-16 with 2,622 outputs) and LeNet-5 (LeCun et al. 1998, 28 x 28). Layers carry
the names that the `.tflite` models of the zoo have; ReLU is part of its layer, dropout is absent, and the softmax behind the
last layer is not counted. Values are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer, one sample."""

    name: str
    macs: int  # multiply-accumulates
    weight_bytes: int  # parameters read
    input_bytes: int  # activations read
    output_bytes: int  # activations written: G


@dataclass(frozen=True, slots=True)
class NetworkTable:
    """A chain of layers."""

    name: str
    input_bytes: int  # the float32 picture
    layers: tuple[LayerCost, ...]


class _Chain:
    """Builds a table layer by layer, keeping the shape."""

    def __init__(self, height: int, channels: int) -> None:
        self.height, self.channels = height, channels
        self.input_bytes = self._bytes()
        self.layers: list[LayerCost] = []

    def conv(self, name: str, filters: int, size: int, stride: int = 1, same: bool = True) -> _Chain:
        before = self._bytes()
        fan_in = size * size * self.channels
        self.height = -(-self.height // stride) if same else (self.height - size) // stride + 1
        self.channels = filters
        outputs = self.height * self.height * filters
        return self._add(name, outputs * fan_in, (fan_in + 1) * filters, before)

    def norm(self, name: str) -> _Chain:
        # local response normalisation over five channels
        return self._add(name, 5 * self._values(), 0, self._bytes())

    def pool(self, name: str, size: int, stride: int) -> _Chain:
        before = self._bytes()
        self.height = (self.height - size) // stride + 1
        return self._add(name, 0, 0, before)

    def dense(self, name: str, outputs: int) -> _Chain:
        before, inputs = self._bytes(), self._values()
        self.height, self.channels = 1, outputs
        return self._add(name, inputs * outputs, (inputs + 1) * outputs, before)

    def table(self, name: str) -> NetworkTable:
        return NetworkTable(name, self.input_bytes, tuple(self.layers))

    def _values(self) -> int:
        return self.height * self.height * self.channels

    def _bytes(self) -> int:
        return FLOAT_BYTES * self._values()

    def _add(self, name: str, macs: int, weights: int, before: int) -> _Chain:
        self.layers.append(LayerCost(name, macs, FLOAT_BYTES * weights, before, self._bytes()))
        return self


def _alexnet() -> NetworkTable:
    chain = _Chain(227, 3)
    chain.conv("conv_1", 96, 11, 4, same=False).norm("norm_1").pool("maxpool_1", 3, 2)
    chain.conv("conv_2", 256, 5).norm("norm_2").pool("maxpool_2", 3, 2)
    chain.conv("conv_3", 384, 3).conv("conv_4", 384, 3).conv("conv_5", 256, 3).pool("maxpool_3", 3, 2)
    return chain.dense("fc_1", 4096).dense("fc_2", 4096).dense("fc_3", 1000).table("alexnet")


def _vgg(name: str, outputs: int) -> NetworkTable:
    chain = _Chain(224, 3)
    for block, (filters, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1):
        for index in range(1, count + 1):
            chain.conv(f"conv_{block}_{index}", filters, 3)
        chain.pool(f"maxpool_{block}", 2, 2)
    return chain.dense("fc_1", 4096).dense("fc_2", 4096).dense("fc_3", outputs).table(name)


def _lenet() -> NetworkTable:
    chain = _Chain(28, 1).conv("conv_1", 6, 5).pool("maxpool_1", 2, 2)
    chain.conv("conv_2", 16, 5, same=False).pool("maxpool_2", 2, 2)
    return chain.dense("fc_1", 120).dense("fc_2", 84).dense("fc_3", 10).table("lenet")


TABLES = {table.name: table for table in (_alexnet(), _vgg("vgg16", 1000), _vgg("deepface", 2622), _lenet())}
