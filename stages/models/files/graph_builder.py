"""A builder of `.tflite` models from tensors, operators, subgraphs and weights.

The zoo's networks and the tests' small models are built with it. Weights are generated when the file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from stages.models.files.flatbuffer_writer import Blob, Chunk, tflite_bytes, tflite_chunks

_DTYPES: dict[str, int] = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "float64": schema.TensorType.FLOAT64,
    "int8": schema.TensorType.INT8,
    "int16": schema.TensorType.INT16,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
    "uint8": schema.TensorType.UINT8,
    "uint16": schema.TensorType.UINT16,
    "uint32": schema.TensorType.UINT32,
    "bool": schema.TensorType.BOOL,
    "resource": schema.TensorType.RESOURCE,
}


class Quantization(NamedTuple):
    """Real value = scale * (stored value - zero point), for the whole tensor or per slice of one dimension."""

    scales: Sequence[float]
    zero_points: Sequence[int]
    dimension: int = 0  # with several scales: the dimension whose slices they belong to


class GraphBuilder:
    """One model under construction. Tensors are plain indices into the current subgraph."""

    def __init__(self, description: str) -> None:
        self._model = schema.ModelT(version=3, description=description, operatorCodes=[], subgraphs=[])
        self._model.buffers = [schema.BufferT()]  # buffer 0 means "no data", by convention
        self._model.metadata = []
        self._model.signatureDefs = []
        self._blobs: dict[int, Blob] = {}
        self._codes: dict[tuple[int, str | None, int], int] = {}
        self.begin_subgraph("main")

    def begin_subgraph(self, name: str) -> int:
        """Starts another subgraph, which the following calls fill, and returns its index."""
        self._graph = schema.SubGraphT(tensors=[], inputs=[], outputs=[], operators=[], name=name)
        self._model.subgraphs.append(self._graph)
        return len(self._model.subgraphs) - 1

    def resume_subgraph(self, index: int) -> None:
        """Directs the following calls to subgraph `index`."""
        self._graph = self._model.subgraphs[index]

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str = "float32",
        *,
        quantization: Quantization | None = None,
        signature: Sequence[int] | None = None,
        buffer: int = 0,
    ) -> int:
        """Adds a tensor; `signature` is the shape with -1 for open dimensions."""
        tensor = schema.TensorT(shape=list(shape), type=_DTYPES[dtype], buffer=buffer, name=name)
        tensor.hasRank = True
        if signature is not None:
            tensor.shapeSignature = list(signature)
        if quantization is not None:
            tensor.quantization = schema.QuantizationParametersT(
                scale=list(quantization.scales),
                zeroPoint=list(quantization.zero_points),
                quantizedDimension=quantization.dimension,
            )
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def record(self, tensor: int) -> Any:
        """The tensor's object of the schema's API, for settings that this builder does not cover."""
        return self._graph.tensors[tensor]

    def input(self, name: str, shape: Sequence[int], dtype: str = "float32", **more: Any) -> int:
        """Adds a tensor that the caller fills."""
        index = self.tensor(name, shape, dtype, **more)
        self._graph.inputs.append(index)
        return index

    def output(self, *tensors: int) -> None:
        """Declares outputs of the subgraph."""
        self._graph.outputs.extend(tensors)

    def constant(self, name: str, value: np.ndarray[Any, Any], dtype: str | None = None, **more: Any) -> int:
        """Adds a tensor with data."""
        array = np.asarray(value, order="C")  # ascontiguousarray would turn a scalar into an array of one dimension
        data = array.tobytes()
        return self.weights(name, array.shape, dtype or array.dtype.name, lambda: (data,), len(data), **more)

    def weights(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        pieces: Callable[[], Iterable[Chunk]],
        size_bytes: int,
        **more: Any,
    ) -> int:
        """Adds a tensor whose data are generated in pieces when the model is written."""
        self._model.buffers.append(schema.BufferT())
        self._blobs[len(self._model.buffers) - 1] = Blob(size_bytes, pieces)
        return self.tensor(name, shape, dtype, buffer=len(self._model.buffers) - 1, **more)

    def operator(
        self,
        kind: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: Any = None,
        *,
        custom_code: str | None = None,
        custom_options: bytes | None = None,
        version: int = 1,
    ) -> None:
        """Adds an operator; `kind` is a name of the schema's `BuiltinOperator`, `options` a `...OptionsT` value."""
        code = getattr(schema.BuiltinOperator, kind)
        operator = schema.OperatorT(
            opcodeIndex=self._code(code, custom_code, version), inputs=list(inputs), outputs=list(outputs)
        )
        if options is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
            operator.builtinOptions = options
        if custom_options is not None:
            operator.customOptions = np.frombuffer(custom_options, np.uint8)
        self._graph.operators.append(operator)

    def _code(self, code: int, custom_code: str | None, version: int) -> int:
        key = (code, custom_code, version)
        if key not in self._codes:
            self._codes[key] = len(self._model.operatorCodes)
            self._model.operatorCodes.append(
                schema.OperatorCodeT(
                    # the old one-byte field holds 127 for all codes above 126
                    deprecatedBuiltinCode=min(code, 127),
                    builtinCode=code,
                    customCode=custom_code,
                    version=version,
                )
            )
        return self._codes[key]

    def metadata(self, name: str, data: bytes) -> None:
        """Attaches named bytes to the model."""
        self._model.buffers.append(schema.BufferT())
        self._blobs[len(self._model.buffers) - 1] = Blob.of(data)
        self._model.metadata.append(schema.MetadataT(name=name, buffer=len(self._model.buffers) - 1))

    def signature(self, key: str, inputs: dict[str, int], outputs: dict[str, int], subgraph: int = 0) -> None:
        """Declares a signature: names that callers use for the tensors of a subgraph."""
        maps = [
            [schema.TensorMapT(name=name, tensorIndex=index) for name, index in names.items()]
            for names in (inputs, outputs)
        ]
        self._model.signatureDefs.append(
            schema.SignatureDefT(inputs=maps[0], outputs=maps[1], signatureKey=key, subgraphIndex=subgraph)
        )

    @property
    def size_bytes(self) -> int:
        """The size of the weights; the file is a few kilobytes larger."""
        return sum(blob.size_bytes for blob in self._blobs.values())

    def chunks(self) -> Iterable[Chunk]:
        """The bytes of the file, in order."""
        return tflite_chunks(self._model, self._blobs)

    def to_bytes(self) -> bytes:
        """The whole file."""
        return tflite_bytes(self._model, self._blobs)
