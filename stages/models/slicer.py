"""The slicer, which cuts a model into `.tflite` parts.

A part holds the layers first..last with their weights, the carried operators that they need, and the subgraphs of their
control flow. The file's inputs are the tensors that the part reads, its outputs the tensors that it makes and later layers
need. A tensor that a later part needs but this one does not use is *forwarded*: it is listed in the part's boundaries
(`inputs`, `outputs`) but is not in the file, and the runner copies it through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from bus.errors import CutError, unknown_name
from bus.text.json_text import json_text
from bus.values import ModelManifest, TensorSpec
from stages.models.files.cache import write_whole
from stages.models.files.flatbuffer_writer import (
    LARGEST_FILE_BYTES,
    STREAMED_BYTES,
    Blob,
    Chunk,
    tflite_chunks,
    tflite_size,
)
from stages.models.files.operators import CONTROL_FLOW, KEPT_METADATA, SHAPE_READERS, kind_of, subgraphs_of, text
from stages.models.files.quantization_details import FIELDS, details_of, named_tensors, with_named_tensors
from stages.models.graph import Graph, indices
from stages.models.model import Model

STRUCTURE_BYTES = 1 << 24
"""Space reserved for everything but weights in a file of maximum size."""


@dataclass(frozen=True)
class SlicedPart:
    """Layers first..last of a model, from which a file can be written."""

    first: int  # first layer, 1..l
    last: int  # last layer, first..l
    inputs: tuple[TensorSpec, ...]  # all tensors that cross position first - 1
    outputs: tuple[TensorSpec, ...]  # all tensors that cross position last
    reads: tuple[str, ...]  # names of the file's inputs, in its order
    makes: tuple[str, ...]  # names of the file's outputs, in its order
    size_bytes: int  # of its weights, about the size of the file
    renew: bool  # whether only a new interpreter resets its state
    _model: Any
    _blobs: Mapping[int, Blob]

    @property
    def forwarded(self) -> tuple[str, ...]:
        """Names of the tensors that cross the part unchanged."""
        made = set(self.makes)
        return tuple(spec.name for spec in self.outputs if spec.name not in made)

    def file_bytes(self, head_bytes: int) -> int:
        """The exact size of the file if its structure, without the weights, has `head_bytes`."""
        return tflite_size(head_bytes, self._blobs)

    def chunks(self) -> Iterable[Chunk]:
        """The file's bytes, in order; the weights are read directly from the mapped model."""
        return tflite_chunks(self._model, self._blobs)

    def edited(self, edit: Callable[[Any], None]) -> SlicedPart:
        """A copy of the part, after `edit` changed its `ModelT`, which lacks the data of large weights."""
        model = copy.deepcopy(self._model)
        edit(model)
        return replace(self, _model=model)

    def to_bytes(self) -> bytes:
        """The whole file in memory."""
        return b"".join(bytes(chunk) for chunk in self.chunks())


def manifest(model: Model) -> ModelManifest:
    """The model's positions and the tensors that cross them."""
    return model.manifest


def position_of(model: Model, cut: str | int) -> int:
    """The position for a user's number, for `input` (0), or for the name of the layer before it.

    Raises `UnknownNameError` for an unknown layer name and `CutError` for a number out of range.
    """
    wanted = str(cut)
    if wanted.isdecimal():
        position = int(wanted)
        if position > model.graph.depth:
            raise CutError(f"{model.name} has positions 0 to {model.graph.depth}, not {position}")
        return position
    for point in model.manifest.cuts:
        if point.name == wanted:
            return point.position
    names = [point.name for point in model.manifest.cuts]
    remedy = f"its positions are {', '.join(names[:8])}, ... (deepar models cuts {model.name})"
    raise unknown_name(f"layer of {model.name} called", wanted, names, remedy=remedy)


def slice_model(model: Model, first: int, last: int) -> SlicedPart:
    """Cuts out layers first..last (1-based, inclusive).

    Raises `CutError` if these layers do not exist or the model cannot be cut at first - 1 or last.
    """
    graph = model.graph
    if not 1 <= first <= last <= graph.depth:
        raise CutError(f"{model.name} has layers 1 to {graph.depth}, not {first} to {last}")
    graph.require_cuttable(first - 1)
    graph.require_cuttable(last)
    part = _PartBuilder(graph, first, last).part()
    if part.size_bytes > LARGEST_FILE_BYTES - STRUCTURE_BYTES:
        raise CutError(
            f"layers {first} to {last} of {model.name} have {part.size_bytes:,} bytes, too many for one file; cut them"
        )
    return part


class _PartBuilder:
    """Builds one part."""

    def __init__(self, graph: Graph, first: int, last: int) -> None:
        self._graph = graph
        self._first, self._last = first, last
        source = graph.model
        self._source = source
        self._target = schema.ModelT(
            version=source.version,
            description=f"layers {first} to {last} of {text(source.description)}".strip(),
            operatorCodes=[],
            subgraphs=[],
            buffers=[schema.BufferT()],
            metadata=[],
            signatureDefs=[],
        )
        self._codes: dict[int, int] = {}
        self._buffers: dict[int, int] = {0: 0}
        self._subgraphs: dict[int, int] = {}
        self._blobs: dict[int, Blob] = {}

    def part(self) -> SlicedPart:
        graph = self._graph
        before, after = graph.live(self._first - 1), graph.live(self._last)
        chosen = [at for operators in graph.layer_operators[self._first - 1 : self._last] for at in operators]
        operators = self._with_carried(chosen, after if self._last == graph.depth else ())
        precomputed = {t for at in operators if self._is_precomputed(at) for t in indices(graph.operators[at].outputs)}
        operators = [at for at in operators if not self._is_precomputed(at)]

        made = {tensor for at in operators for tensor in indices(graph.operators[at].outputs)} | precomputed
        read = {t for at in operators for t in indices(graph.operators[at].inputs) if t >= 0}
        inputs = [tensor for tensor in before if tensor in read and tensor not in made]
        outputs = [t for t in after if t in made or (graph.is_constant(t) and self._last == graph.depth)]

        touched = read | made | set(outputs) | {t for at in operators for t in self._scratch(at)}
        used = sorted(with_named_tensors(graph.tensors, touched))
        renumbered = {tensor: number for number, tensor in enumerate(used)}
        main = schema.SubGraphT(name=self._source.subgraphs[0].name, debugMetadataIndex=-1)
        self._target.subgraphs.append(main)
        self._subgraphs[0] = 0
        main.tensors = [
            self._tensor(graph.tensors[t], self._precomputed_value(t, precomputed), graph.known_shape(t)) for t in used
        ]
        for tensor in used:
            self._renumber_details(tensor, main.tensors[renumbered[tensor]], renumbered)
        main.inputs = [renumbered[tensor] for tensor in inputs]
        main.outputs = [renumbered[tensor] for tensor in outputs]
        main.operators = [self._operator(graph.operators[at], renumbered) for at in operators]
        self._signature(inputs, outputs, renumbered)
        self._metadata()
        return SlicedPart(
            first=self._first,
            last=self._last,
            inputs=tuple(graph.spec(tensor) for tensor in before),
            outputs=tuple(graph.spec(tensor) for tensor in after),
            reads=tuple(graph.names[tensor] for tensor in inputs),
            makes=tuple(graph.names[tensor] for tensor in outputs),
            size_bytes=sum(blob.size_bytes for blob in self._blobs.values()),
            renew=any(graph.resources_of(at) & graph.written_resources for at in operators),
            _model=self._target,
            _blobs=self._blobs,
        )

    def _with_carried(self, chosen: list[int], results: tuple[int, ...]) -> list[int]:
        """The chosen operators and the carried operators that they need, in file order."""
        graph = self._graph
        needed = set(chosen)
        waiting = [t for at in chosen for t in indices(graph.operators[at].inputs)] + list(results)
        while waiting:
            maker = graph.maker(waiting.pop())
            if maker in graph.carried and maker not in needed:
                needed.add(maker)
                if not self._is_precomputed(maker):
                    waiting += indices(graph.operators[maker].inputs)
        touched = {name for at in needed for name in graph.resources_of(at)}
        for at in sorted(graph.carried):
            if graph.kinds[at] == "CALL_ONCE" and graph.resources_of(at) & touched:
                needed.add(at)
        return sorted(needed)

    def _is_precomputed(self, at: int) -> bool:
        """Whether the part stores the value of this carried operator instead of the operator.

        This holds for operators that read the shape of a tensor, because the part may not contain that tensor.
        """
        return at in self._graph.carried and self._graph.kinds[at] in SHAPE_READERS

    def _precomputed_value(self, tensor: int, precomputed: set[int]) -> np.ndarray[Any, Any] | None:
        if tensor not in precomputed:
            return None
        graph = self._graph
        at = graph.maker(tensor)
        assert at is not None
        shape = graph.shape(indices(graph.operators[at].inputs)[0])
        value = shape if graph.kinds[at] == "SHAPE" else len(shape)
        return np.asarray(value, graph.dtype(tensor))

    def _scratch(self, at: int) -> list[int]:
        return [tensor for tensor in indices(self._graph.operators[at].intermediates) if tensor >= 0]

    def _buffer(self, index: int) -> int:
        """The index in the part of a buffer of the model; copies the buffer on first use."""
        if index not in self._buffers:
            data = self._graph.buffer(index)
            target = schema.BufferT()
            if data is None or data.nbytes < STREAMED_BYTES:
                target.data = None if data is None or not data.nbytes else np.frombuffer(bytes(data), np.uint8)
            self._target.buffers.append(target)
            self._buffers[index] = len(self._target.buffers) - 1
            if data is not None and data.nbytes >= STREAMED_BYTES:
                self._blobs[self._buffers[index]] = Blob.of(data)
        return self._buffers[index]

    def _tensor(
        self, source: Any, value: np.ndarray[Any, Any] | None = None, shape: tuple[int, ...] | None = None
    ) -> Any:
        tensor = copy.copy(source)
        if shape is not None:
            tensor.shape = list(shape)  # a file may declare 1 for an open dimension
        if value is None:
            tensor.buffer = self._buffer(source.buffer)
        else:
            self._target.buffers.append(schema.BufferT(data=np.frombuffer(value.tobytes(), np.uint8)))
            tensor.buffer = len(self._target.buffers) - 1
        return tensor

    def _renumber_details(self, index: int, target: Any, renumbered: Mapping[int, int]) -> None:
        """Replaces the tensor indices in the quantisation details of tensor `index` by the indices in the part."""
        details = details_of(target)
        if details is None:
            return
        target.quantization = copy.copy(target.quantization)
        target.quantization.details = copy.copy(details)
        named = named_tensors(self._graph.tensors, index)
        for field in FIELDS:
            setattr(target.quantization.details, field, renumbered[named[field]] if field in named else -1)

    def _operator(self, source: Any, renumbered: Mapping[int, int] | None) -> Any:
        operator = copy.copy(source)
        operator.debugMetadataIndex = -1
        if source.opcodeIndex not in self._codes:
            self._codes[source.opcodeIndex] = len(self._target.operatorCodes)
            self._target.operatorCodes.append(self._source.operatorCodes[source.opcodeIndex])
        operator.opcodeIndex = self._codes[source.opcodeIndex]
        if renumbered is not None:
            for field in ("inputs", "outputs", "intermediates"):
                vector = getattr(source, field)
                if vector is not None:
                    setattr(operator, field, [renumbered.get(t, -1) if t >= 0 else -1 for t in indices(vector)])
        kind = kind_of(self._source.operatorCodes[source.opcodeIndex])
        if subgraphs_of(source, kind):
            holder = "builtinOptions" if source.builtinOptions is not None else "builtinOptions2"
            options = copy.copy(getattr(source, holder))
            if kind in CONTROL_FLOW:
                for field, index in subgraphs_of(source, kind):
                    setattr(options, field, self._subgraph(index))
            else:
                options.branchSubgraphIndices = [self._subgraph(index) for _, index in subgraphs_of(source, kind)]
            setattr(operator, holder, options)
        return operator

    def _subgraph(self, index: int) -> int:
        """The index in the part of a control-flow subgraph; copies the subgraph on first use."""
        if index not in self._subgraphs:
            source = self._source.subgraphs[index]
            target = copy.copy(source)
            target.debugMetadataIndex = -1
            self._target.subgraphs.append(target)
            self._subgraphs[index] = len(self._target.subgraphs) - 1
            target.tensors = [self._tensor(tensor) for tensor in source.tensors or []]
            target.operators = [self._operator(operator, None) for operator in source.operators or []]
        return self._subgraphs[index]

    def _signature(self, inputs: list[int], outputs: list[int], renumbered: Mapping[int, int]) -> None:
        """Names the model's inputs and outputs as its signature does; inner tensors keep their tensor names."""
        named = [entry for entry in self._source.signatureDefs or [] if entry.subgraphIndex == 0]
        if not named:
            return
        aliases = [
            {entry.tensorIndex: text(entry.name) for entry in side or []}
            for side in (named[0].inputs, named[0].outputs)
        ]
        maps = [
            [
                schema.TensorMapT(name=names.get(tensor, self._graph.names[tensor]), tensorIndex=renumbered[tensor])
                for tensor in side
            ]
            for names, side in zip(aliases, (inputs, outputs), strict=True)
        ]
        self._target.signatureDefs.append(
            schema.SignatureDefT(inputs=maps[0], outputs=maps[1], signatureKey=named[0].signatureKey, subgraphIndex=0)
        )

    def _metadata(self) -> None:
        for entry in self._source.metadata or []:
            if text(entry.name) in KEPT_METADATA:
                self._target.metadata.append(schema.MetadataT(name=entry.name, buffer=self._buffer(entry.buffer)))


def write_parts(model: Model, cuts: list[int], folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Writes the parts between `cuts` (positions inside the model, ascending) and `manifest.json` into `folder`.

    Returns the manifest's path and its `parts`. With two cuts the parts' roles are device, edge and cloud. A part without
    layers (a cut at 0, at l, or two equal cuts) has no file. Raises `CutError` or `ModelError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [0, *cuts, model.graph.depth]
    roles = ["device", "edge", "cloud"] if len(bounds) == 4 else [f"part{k}" for k in range(1, len(bounds))]
    parts = []
    for role, (begin, end) in zip(roles, pairwise(bounds), strict=False):
        if begin == end:
            continue
        part = slice_model(model, begin + 1, end)
        path = folder / f"{model.name}-{begin + 1}-{end}.tflite"
        digest = write_whole(path, part.chunks(), size_bytes=part.size_bytes)
        parts.append(
            {
                "role": role,
                "file": path.name,
                "first": begin + 1,
                "last": end,
                "size_bytes": path.stat().st_size,
                "sha256": digest,
                "inputs": [spec.model_dump(mode="json") for spec in part.inputs],
                "outputs": [spec.model_dump(mode="json") for spec in part.outputs],
                "reads": list(part.reads),
                "makes": list(part.makes),
                "forwarded": list(part.forwarded),
            }
        )
    document = {
        "model": model.name,
        "sha256": model.file_sha256,
        "signature": model.contents.meant,
        "layers": model.graph.depth,
        "cuts": [{"position": cut, "name": model.manifest.cuts[cut].name} for cut in cuts],
        "parts": parts,
    }
    path = folder / "manifest.json"
    write_whole(path, [json_text(document, indent=2).encode() + b"\n"])
    return path, parts
