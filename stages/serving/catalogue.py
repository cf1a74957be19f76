"""Served models: what clients see of a model file, and how their tensors map to those of a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bus.errors import ModelError
from bus.tensors import Array
from stages.models.files.metadata import read_metadata
from stages.models.files.operators import text
from stages.models.graph import Graph
from stages.models.model import Model
from stages.serving.tensors import DATATYPE_OF
from stages.serving.values import ModelInfo, TensorInfo

VERSION = "1"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model and the order of its tensors on a device."""

    info: ModelInfo
    inputs: tuple[str, ...]  # names in the order in which a device takes the tensors
    outputs: tuple[int, ...]  # of each output: its place among the tensors that a device returns

    def split(self, inputs: Mapping[str, Array], samples: int) -> list[list[Array]]:
        """The input tensors of each sample: views of the request's."""
        if samples == 1:
            return [[inputs[name] for name in self.inputs]]
        return [[inputs[name][at : at + 1] for name in self.inputs] for at in range(samples)]

    def joined(self, results: Sequence[Sequence[Array]], wanted: Sequence[str]) -> list[tuple[TensorInfo, Array]]:
        """The wanted outputs (none: all) of all samples. Raises ValueError where their shapes differ."""
        found = {}
        for info, place in zip(self.info.outputs, self.outputs, strict=True):
            parts = [result[place] for result in results]
            found[info.name] = (info, parts[0] if len(parts) == 1 else np.concatenate(parts))
        return [found[name] for name in wanted] if wanted else list(found.values())


def served_model(model: Model) -> ServedModel:
    """A model under the names of its signature, or of its tensors where it has none.

    Raises `ModelError` where the protocol cannot carry the type of a tensor.
    """
    graph = model.graph
    inputs = _named(graph, "inputs", graph.inputs)
    outputs = _named(graph, "outputs", graph.outputs)
    info = ModelInfo(
        name=model.name,
        version=VERSION,
        sha256=model.sha256,
        inputs=tuple(_tensor(model, name, tensor) for name, tensor in inputs),
        outputs=tuple(_tensor(model, name, tensor) for name, tensor in outputs),
        metadata=read_metadata(model.data),
    )
    names = {tensor: name for name, tensor in reversed(inputs)}
    places = tuple(graph.outputs.index(tensor) for _, tensor in outputs)
    return ServedModel(info, tuple(names[tensor] for tensor in graph.inputs), places)


def _named(graph: Graph, side: str, tensors: Sequence[int]) -> list[tuple[str, int]]:
    """Name and tensor of each input or output, in the order of the signature; else in the order of the model."""
    named = [entry for entry in graph.model.signatureDefs or [] if entry.subgraphIndex == 0]
    entries: list[Any] = list(getattr(named[0], side) or []) if named else []
    found = [(text(entry.name), int(entry.tensorIndex)) for entry in entries]
    if {tensor for _, tensor in found} != set(tensors) or len({name for name, _ in found}) != len(found):
        return [(graph.names[tensor], tensor) for tensor in tensors]
    return found


def _tensor(model: Model, name: str, tensor: int) -> TensorInfo:
    dtype = model.graph.dtype(tensor)
    if dtype not in DATATYPE_OF:
        raise ModelError(
            str(model.path), f"tensor {name} is of type {dtype}, which the inference protocol cannot carry"
        )
    return TensorInfo(name=name, datatype=DATATYPE_OF[dtype], dtype=dtype, shape=model.graph.shape(tensor))
