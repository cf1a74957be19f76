"""A runtime of MLServer that computes a `.tflite` model, as plainly as MLServer's own documentation shows it."""

from __future__ import annotations

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class TfliteModel(MLModel):
    """Computes one sample a request."""

    async def load(self) -> bool:
        self._interpreter = Interpreter(model_path=self.settings.parameters.uri, num_threads=1)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        array = NumpyCodec.decode_input(payload.inputs[0])
        self._interpreter.set_tensor(self._input, array.astype(np.float32, copy=False))
        self._interpreter.invoke()
        output = self._interpreter.get_tensor(self._output)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("output", output)])
