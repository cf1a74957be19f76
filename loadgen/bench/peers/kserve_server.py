"""A server of KServe that computes a `.tflite` model: `python kserve_server.py MODEL FILE HTTP_PORT GRPC_PORT`."""

from __future__ import annotations

import sys
from typing import Any

import kserve
from ai_edge_litert.interpreter import Interpreter
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class TfliteModel(Model):
    """Computes one sample a request."""

    def __init__(self, name: str, file: str) -> None:
        super().__init__(name)
        self._interpreter = Interpreter(model_path=file, num_threads=1)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]
        self.ready = True

    def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        self._interpreter.set_tensor(self._input, payload.inputs[0].as_numpy())
        self._interpreter.invoke()
        array = self._interpreter.get_tensor(self._output)
        output = InferOutput("output", list(array.shape), "FP32")
        output.set_data_from_numpy(array, binary_data=False)
        return InferResponse(response_id=payload.id or "1", model_name=self.name, infer_outputs=[output])


if __name__ == "__main__":
    _, model, file, http_port, grpc_port = sys.argv
    assert kserve
    ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1).start([TfliteModel(model, file)])
