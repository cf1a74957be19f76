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
    """One file on the GPU, in float32, for batches of a fixed size.

    Another size would compile the file again, which takes as long as loading it. Raises `RuntimeError` if the driver
    refuses it.
    """

    def __init__(self, path: str, inputs: list[list[int]], outputs: list[list[int]], batch: int = 1) -> None:
        """`inputs` and `outputs` are the shapes for one sample, in the order of the file."""
        options = Options(
            hardware_accelerators=HardwareAccelerator.GPU, gpu_options=GpuOptions(enforce_f32=True)
        )  # without enforce_f32 it is slower and less exact
        self._model: Any = CompiledModel.from_file(path, options=options)
        if batch > 1:
            for index, shape in enumerate(inputs):
                self._model.resize_input_tensor(index, [batch, *shape[1:]], 0, strict=False)
        self._inputs = self._model.create_input_buffers(0)
        self._outputs = self._model.create_output_buffers(0)
        if not self._model.is_fully_accelerated():  # after a resize it is known only once the buffers exist
            raise RuntimeError("the GPU cannot run all of its operators")
        self._input_sizes, self._output_sizes = ([batch * prod(shape) for shape in side] for side in (inputs, outputs))
        if (len(inputs), len(outputs)) != (len(self._inputs), len(self._outputs)):
            raise RuntimeError(f"it has {len(self._inputs)} inputs and {len(self._outputs)} outputs there")

    def run(self, inputs: Array, outputs: Array) -> None:
        """Compute one batch: all values of all inputs, one after the other, to all values of all outputs."""
        at = 0
        for buffer, size in zip(self._inputs, self._input_sizes, strict=True):
            buffer.write(inputs[at : at + size])
            at += size
        self._model.run_by_index(0, self._inputs, self._outputs)
        at = 0
        for buffer, size in zip(self._outputs, self._output_sizes, strict=True):
            outputs[at : at + size] = buffer.read(size, np.float32)  # waits for the GPU
            at += size
