"""Variants of a model file: the user's choice of a signature and of shapes for inputs of open shape.

A choice is written into a copy of the file: the signature's subgraph becomes subgraph 0, and inputs declare the given shapes.
Trial run, cuts, slices and runners then see an ordinary model. Its hash is computed from the file's hash and the choice, so
that nodes with different choices reject each other's activations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from bus.errors import ConfigError, UnknownNameError
from stages.models.files.choice import ModelChoice, Shape, shape_words
from stages.models.files.flatbuffer_writer import STREAMED_BYTES, Blob, ModelBytes, stored_bytes
from stages.models.files.operators import KEPT_METADATA, kind_of, subgraphs_of, text

LARGEST_DIMENSION = (1 << 31) - 1
"""Largest dimension that the file format can store."""


@dataclass(frozen=True)
class Signature:
    """One entry point of a file."""

    name: str  # its key in the file
    inputs: tuple[str, ...]  # the names that callers use
    outputs: tuple[str, ...]
    meant: bool  # whether it is the chosen signature
    seen: bool  # whether its subgraph is the chosen one


@dataclass(frozen=True)
class OpenInput:
    """An input with at least one dimension that the file leaves open."""

    name: str  # of the tensor
    declared: Shape  # the shape in the file, used unless the user gives another
    pattern: Shape  # -1 for an open dimension

    @property
    def words(self) -> str:
        """`1x?`: a question mark for every open dimension."""
        return shape_words(self.pattern)


@dataclass(frozen=True)
class Contents:
    """The choices that a file offers, and the parts of it outside the chosen signature."""

    signatures: tuple[Signature, ...] = ()
    unseen: tuple[str, ...] = ()  # what the choice leaves out: `signature decode`, `subgraph 3`
    open_inputs: tuple[OpenInput, ...] = ()  # of the chosen subgraph, if the user gave no shape
    main: int = 0  # index in the file of the chosen subgraph

    @property
    def meant(self) -> str | None:
        """The name of the chosen signature; None if the subgraph has none."""
        return next((one.name for one in self.signatures if one.meant), None)

    @property
    def remedy(self) -> str | None:
        """How to give the open shapes; None if all shapes are fixed."""
        if not self.open_inputs:
            return None
        options = " ".join(f"--input-shape {one.name}={one.words}" for one in self.open_inputs)
        return f"give a number for every question mark: {options}"


def contents(model: Any, choice: ModelChoice, shown: str) -> Contents:
    """The contents of a file under a choice. Raises `UnknownNameError` for an unknown signature or input."""
    entry = _chosen(model, choice.signature, shown)
    main = 0 if entry is None else entry.subgraphIndex
    signatures = tuple(
        Signature(
            name=text(one.signatureKey),
            inputs=tuple(text(item.name) for item in one.inputs or []),
            outputs=tuple(text(item.name) for item in one.outputs or []),
            meant=one is entry,
            seen=one.subgraphIndex == main,
        )
        for one in model.signatureDefs or []
    )
    given = _given_shapes(model.subgraphs[main], entry, choice, shown)
    still_open = tuple(one for index, one in _open_inputs(model.subgraphs[main]).items() if index not in given)
    return Contents(signatures, tuple(_unseen(model, main, signatures)), still_open, main)


def chosen_hash(sha256: str, model: Any, choice: ModelChoice, shown: str) -> str:
    """The hash of the file under a choice: the file's own hash if the choice changes nothing."""
    entry = _chosen(model, choice.signature, shown)
    main = 0 if entry is None else entry.subgraphIndex
    shapes = _given_shapes(model.subgraphs[main], entry, choice, shown)
    shapes = {i: shape for i, shape in shapes.items() if shape != tuple(_ints(model.subgraphs[main].tensors[i].shape))}
    if entry is _chosen(model, None, shown) and not shapes:
        return sha256
    lines = [sha256, *([f"signature {text(entry.signatureKey)}"] if entry is not None else [])]
    lines += [f"input {index} {shape_words(shape)}" for index, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def rewritten(model: Any, data: ModelBytes, choice: ModelChoice, shown: str) -> dict[int, Blob]:
    """Writes the choice into `model`, which was unpacked from `data`; returns the large buffers by index."""
    entry = _chosen(model, choice.signature, shown)
    main = 0 if entry is None else entry.subgraphIndex
    for index, shape in _given_shapes(model.subgraphs[main], entry, choice, shown).items():
        model.subgraphs[main].tensors[index].shape = list(shape)
    if entry is not None:
        model.signatureDefs = [entry]
        entry.subgraphIndex = 0
    if main:
        _swap_subgraphs(model, main)
        model.metadata = [one for one in model.metadata or [] if text(one.name) in KEPT_METADATA]
    return _detached_buffers(model, data)


def _chosen(model: Any, name: str | None, shown: str) -> Any:
    """The signature called `name`; without a name, the first of the main subgraph, or None if it has none."""
    entries = list(model.signatureDefs or [])
    if name is None:
        return next((entry for entry in entries if entry.subgraphIndex == 0), None)
    for entry in entries:
        if text(entry.signatureKey) == name:
            return entry
    names = ", ".join(text(entry.signatureKey) for entry in entries)
    raise UnknownNameError(
        f"{shown} has no signature {name}", remedy=f"it has {names or 'none: leave --signature out'}"
    )


def _open_inputs(graph: Any) -> dict[int, OpenInput]:
    found = {}
    for index in _ints(graph.inputs):
        tensor = graph.tensors[index]
        declared, pattern = _ints(tensor.shape), _ints(tensor.shapeSignature) or _ints(tensor.shape)
        if any(size < 0 for size in pattern):
            found[index] = OpenInput(text(tensor.name), tuple(max(size, 1) for size in declared), tuple(pattern))
    return found


def _given_shapes(graph: Any, entry: Any, choice: ModelChoice, shown: str) -> dict[int, Shape]:
    """Input index -> the shape that the user gave."""
    names = {text(graph.tensors[index].name): index for index in _ints(graph.inputs)}
    names |= {text(item.name): item.tensorIndex for item in (entry.inputs or [] if entry is not None else [])}
    still_open = _open_inputs(graph)
    found: dict[int, Shape] = {}
    for name, shape in choice.input_shapes.items():
        if name not in names:
            raise UnknownNameError(f"{shown} has no input {name}", remedy=f"its inputs are {', '.join(names)}")
        index = names[name]
        declared = tuple(_ints(graph.tensors[index].shape))
        pattern = still_open[index].pattern if index in still_open else declared
        fits = len(shape) == len(pattern) and all(
            wanted in (size, -1) for size, wanted in zip(shape, pattern, strict=True)
        )
        if not fits:
            raise ConfigError(
                f"--input-shape {name}={shape_words(shape)}: the input of {shown} is {shape_words(pattern) or 'one number'}"
            )
        if max(shape, default=0) > LARGEST_DIMENSION:
            raise ConfigError(
                f"--input-shape {name}={shape_words(shape)}: a dimension is at most {LARGEST_DIMENSION:,}"
            )
        found[index] = shape
    return found


def _unseen(model: Any, main: int, signatures: Iterable[Signature]) -> Iterable[str]:
    """Descriptions of the signatures and subgraphs that `main` and the subgraphs it runs leave out."""
    yield from (f"signature {one.name}" for one in signatures if not one.seen)
    named = {entry.subgraphIndex for entry in model.signatureDefs or []}
    reached = _reached(model, {0, main} | named)
    if main and 0 not in named:
        yield "the main subgraph, which has no signature"
    yield from (
        f"subgraph {index}, which nothing runs" for index in range(len(model.subgraphs)) if index not in reached
    )


def _reached(model: Any, roots: set[int]) -> set[int]:
    reached: set[int] = set()
    waiting = list(roots)
    while waiting:
        index = waiting.pop()
        if index not in reached:
            reached.add(index)
            for operator in model.subgraphs[index].operators or []:
                waiting += [below for _, below in subgraphs_of(operator, _kind(model, operator))]
    return reached


def _swap_subgraphs(model: Any, main: int) -> None:
    """Swaps subgraph `main` with subgraph 0 and updates the operators that run either."""
    graphs = model.subgraphs
    graphs[0], graphs[main] = graphs[main], graphs[0]
    moved = {0: main, main: 0}
    for graph in graphs:
        for operator in graph.operators or []:
            options = operator.builtinOptions if operator.builtinOptions is not None else operator.builtinOptions2
            run = subgraphs_of(operator, _kind(model, operator))
            if run and run[0][0] == "branchSubgraphIndices":
                options.branchSubgraphIndices = [moved.get(index, index) for _, index in run]
                continue
            for name, index in run:
                setattr(options, name, moved.get(index, index))


def _detached_buffers(model: Any, data: ModelBytes) -> dict[int, Blob]:
    """Replaces the buffers by ones that can be packed again; returns large ones to be streamed from `data`."""
    blobs: dict[int, Blob] = {}
    for index in range(len(model.buffers)):
        stored = stored_bytes(model, data, index)
        buffer = schema.BufferT()
        if stored is not None and stored.nbytes >= STREAMED_BYTES:
            blobs[index] = Blob.of(stored)
        elif stored is not None and stored.nbytes:
            buffer.data = np.frombuffer(bytes(stored), np.uint8)
        model.buffers[index] = buffer
    return blobs


def _kind(model: Any, operator: Any) -> str:
    return kind_of(model.operatorCodes[operator.opcodeIndex])


def _ints(vector: Any) -> list[int]:
    return [] if vector is None else [int(item) for item in vector]
