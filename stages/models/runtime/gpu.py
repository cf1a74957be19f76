"""A `.tflite` file compiled for the GPU by LiteRT; only the child process of `stages.models.gpu` may import it."""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.gpu_options import GpuOptions
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import Options


class GpuModel:
    """One file on the GPU, in float32. Sizes count the values of each tensor, in the order of the file.

    Raises `RuntimeError` if the driver refuses it.
    """

    def __init__(self, path: str, input_sizes: list[int], output_sizes: list[int]) -> None:
        options = Options(
            hardware_accelerators=HardwareAccelerator.GPU, gpu_options=GpuOptions(enforce_f32=True)
        )  # without enforce_f32 it is slower and less exact
        self._model: Any = CompiledModel.from_file(path, options=options)
        if not self._model.is_fully_accelerated():
            raise RuntimeError("the GPU cannot run all of its operators")
        self._inputs = self._model.create_input_buffers(0)
        self._outputs = self._model.create_output_buffers(0)
        self._input_sizes, self._output_sizes = input_sizes, output_sizes
        if (len(input_sizes), len(output_sizes)) != (len(self._inputs), len(self._outputs)):
            raise RuntimeError(f"it has {len(self._inputs)} inputs and {len(self._outputs)} outputs there")

    def run(self, inputs: memoryview) -> list[memoryview]:
        """The results of one sample."""
        values, at = np.frombuffer(inputs, np.float32), 0
        for buffer, size in zip(self._inputs, self._input_sizes, strict=True):
            buffer.write(values[at : at + size])
            at += size
        self._model.run_by_index(0, self._inputs, self._outputs)
        return [
            np.ascontiguousarray(buffer.read(size, np.float32)).reshape(-1).view(np.uint8).data
            for buffer, size in zip(self._outputs, self._output_sizes, strict=True)
        ]
