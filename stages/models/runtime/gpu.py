"""A `.tflite` file compiled for the GPU by LiteRT; only the child process of `stages.models.gpu` may import it."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.gpu_options import GpuOptions
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import Options

from bus.tensors import Array


class GpuModel:
    """One file on the GPU, in float32. Raises `RuntimeError` if the driver refuses it."""

    def __init__(self, path: str, inputs: list[list[int]], outputs: list[list[int]]) -> None:
        """`inputs` and `outputs` are shapes, in the order of the file."""
        options = Options(
            hardware_accelerators=HardwareAccelerator.GPU, gpu_options=GpuOptions(enforce_f32=True)
        )  # without enforce_f32 it is slower and less exact
        self._model: Any = CompiledModel.from_file(path, options=options)
        if not self._model.is_fully_accelerated():
            raise RuntimeError("the GPU cannot run all of its operators")
        self._inputs = self._model.create_input_buffers(0)
        self._outputs = self._model.create_output_buffers(0)
        self._input_sizes, self._output_sizes = ([prod(shape) for shape in side] for side in (inputs, outputs))
        if (len(inputs), len(outputs)) != (len(self._inputs), len(self._outputs)):
            raise RuntimeError(f"it has {len(self._inputs)} inputs and {len(self._outputs)} outputs there")

    def run(self, inputs: Array, outputs: Array) -> None:
        """Compute all values of all outputs from those of all inputs, one tensor after the other."""
        at = 0
        for buffer, size in zip(self._inputs, self._input_sizes, strict=True):
            buffer.write(inputs[at : at + size])
            at += size
        self._model.run_by_index(0, self._inputs, self._outputs)
        at = 0
        for buffer, size in zip(self._outputs, self._output_sizes, strict=True):
            outputs[at : at + size] = buffer.read(size, np.float32)  # waits for the GPU
            at += size
