"""LOCAL_RESPONSE_NORMALIZATION, which LiteRT's GPU accelerator lacks, written with operators that it has.

`y = x * (bias + alpha * sum of x^2 over 2 * radius + 1 neighbouring channels) ^ -beta`: the sum over neighbouring channels is
a convolution of size 1, whose kernel is a band. The results differ from the operator's by rounding, so only the GPU gets
this form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from bus.tensors import Array
from stages.models.files.operators import kind_of
from stages.models.slicer import SlicedPart

MOST_CHANNELS = 2048
"""Above it the kernel, which has the square of the channels as values, costs more than it gains: the CPU normalises."""


def for_gpu(part: SlicedPart) -> SlicedPart:
    """The part for the GPU: its normalisations across channels are replaced; all else stays as it is."""
    return part.edited(_replace)


def _replace(model: Any) -> None:
    main = model.subgraphs[0]
    operators = main.operators
    main.operators = []
    for operator in operators:
        if _is_replaceable(model, operator):
            _Normalization(model, operator).write()
        else:
            main.operators.append(operator)


def _is_replaceable(model: Any, operator: Any) -> bool:
    if kind_of(model.operatorCodes[operator.opcodeIndex]) != "LOCAL_RESPONSE_NORMALIZATION":
        return False
    channels = model.subgraphs[0].tensors[operator.inputs[0]].shape[-1]
    return operator.builtinOptions is not None and 1 <= channels <= MOST_CHANNELS


class _Normalization:
    """The operators that replace one normalisation."""

    def __init__(self, model: Any, operator: Any) -> None:
        self._model, self._main = model, model.subgraphs[0]
        self._options = operator.builtinOptions
        self._input, self._output = int(operator.inputs[0]), int(operator.outputs[0])

    def write(self) -> None:
        options, channels = self._options, int(self._main.tensors[self._input].shape[-1])
        places = np.arange(channels)
        band = np.abs(places[:, None] - places) <= options.radius
        kernel = (band * np.float32(options.alpha)).astype(np.float32).reshape(channels, 1, 1, channels)
        squares, sums, factors = (self._inner() for _ in range(3))
        self._operator("SQUARE", [self._input], squares, schema.SquareOptionsT())
        convolution = schema.Conv2DOptionsT(padding=schema.Padding.VALID, strideW=1, strideH=1)
        bias = np.full(channels, options.bias, np.float32)
        self._operator("CONV_2D", [squares, self._constant(kernel), self._constant(bias)], sums, convolution)
        exponent = np.array([-options.beta], np.float32)
        self._operator("POW", [sums, self._constant(exponent)], factors, schema.PowOptionsT())
        self._operator("MUL", [self._input, factors], self._output, schema.MulOptionsT())

    def _operator(self, kind: str, inputs: list[int], output: int, options: Any) -> None:
        code = getattr(schema.BuiltinOperator, kind)
        self._model.operatorCodes.append(schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=1))
        operator = schema.OperatorT(
            opcodeIndex=len(self._model.operatorCodes) - 1, inputs=inputs, outputs=[output], builtinOptions=options
        )
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self._main.operators.append(operator)

    def _inner(self) -> int:
        """A tensor like the input."""
        return self._tensor(list(self._main.tensors[self._input].shape), 0)

    def _constant(self, value: Array) -> int:
        self._model.buffers.append(schema.BufferT(data=np.frombuffer(value.tobytes(), np.uint8)))
        return self._tensor(list(value.shape), len(self._model.buffers) - 1)

    def _tensor(self, shape: list[int], buffer: int) -> int:
        number = len(self._main.tensors)
        tensor = schema.TensorT(
            shape=shape, type=schema.TensorType.FLOAT32, buffer=buffer, name=f"normalization_{number}"
        )
        tensor.hasRank = True
        self._main.tensors.append(tensor)
        return number
