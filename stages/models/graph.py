"""The chain of layers and cut positions in a model's main subgraph.

A *layer* is an operator of the main subgraph that depends on the input. Two kinds of operator are *carried* instead, which
means copied into every slice that needs them: those that depend only on constants (DEQUANTIZE of fp16 weights, DENSIFY of
sparse weights, arithmetic on shapes) and those that only name or initialise state (VAR_HANDLE, CALL_ONCE).

A RESHAPE that only flattens what one FULLY_CONNECTED operator reads belongs to that operator's layer: a cut before it and a
cut after it send the same bytes and leave the same work on either side.

Position p is after layer p in file order, which is the order of execution. The tensors that *cross* it are those made before
it and read after it; model outputs count as read at the end. A position is *blocked* if layers on both sides share state, if
a crossing tensor has a shape known only at run time or a type that messages cannot carry, or if the runtime has no kernel for
its layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from bus.errors import CutError, ModelError
from bus.values import CutPoint, ModelManifest, TensorSpec
from stages.models.files.flatbuffer_writer import ModelBytes, stored_bytes
from stages.models.files.operators import (
    HANDLES,
    SHAPE_READERS,
    SHAPED_BY,
    SHAPED_BY_VALUES,
    UNREPEATABLE,
    WRITERS,
    constants_without_elements,
    kind_of,
    multiply_accumulates,
    subgraphs_of,
    text,
)
from stages.models.runtime.facts import RuntimeFacts

TYPE_NAMES: dict[int, str] = {
    code: name.lower()
    for name, code in vars(schema.TensorType).items()
    if not name.startswith("_") and isinstance(code, int)
}

TRAVELLING = frozenset(
    (
        *("float16", "float32", "float64", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128"),
    )
)
"""Tensor types that messages can carry across a cut, by numpy name."""


@dataclass(frozen=True)
class Layer:
    """One layer."""

    position: int  # 1..l
    name: str  # of its first output tensor, made unique
    kind: str  # e.g. "CONV_2D"
    operator: int  # index among the main subgraph's operators, without the RESHAPE that belongs to it
    work: float  # estimated multiply-accumulates
    output_bytes: int  # size of its outputs


class Graph:
    """Layers, positions and crossing tensors, derived from the file and the findings of the trial run."""

    def __init__(self, model: Any, data: ModelBytes, path: str, facts: RuntimeFacts) -> None:
        self.model = model
        self._data = data
        self.path = path
        self.facts = facts
        self._main = model.subgraphs[0]
        self.operators: list[Any] = list(self._main.operators or [])
        self.tensors: list[Any] = list(self._main.tensors or [])
        self.kinds = [kind_of(model.operatorCodes[operator.opcodeIndex]) for operator in self.operators]
        self.whole_inputs = tuple(indices(self._main.inputs))
        self.whole_outputs = tuple(indices(self._main.outputs))
        self.inputs = tuple(dict.fromkeys(indices(self._main.inputs)))
        self.outputs = tuple(dict.fromkeys(indices(self._main.outputs)))
        self._makers = {out: at for at, operator in enumerate(self.operators) for out in indices(operator.outputs)}
        self._without_elements = constants_without_elements(self._main)
        self.carried, self.unsettled = self._classified()
        flattens = self._flattens()
        self.layer_operators: list[tuple[int, ...]] = [  # of each layer; the one that names it is the last
            (flattens[at], at) if at in flattens else (at,)
            for at in range(len(self.operators))
            if at not in self.carried and at not in flattens.values()
        ]
        if not self.layer_operators:
            raise ModelError(path, "has no operator that depends on its input")

    @classmethod
    def of(cls, data: ModelBytes, path: str, facts: RuntimeFacts | None = None) -> Graph:
        """The graph of a file that `stages.models.files.validation` accepted."""
        return cls(schema.ModelT.InitFromPackedBuf(data, 0), data, path, facts or RuntimeFacts())

    # --- tensors -------------------------------------------------------------------------------------------------

    def shape(self, tensor: int) -> tuple[int, ...]:
        """The shape that the trial run found, else the declared shape."""
        known = self.facts.shape(tensor)
        return known if known is not None else tuple(max(size, 0) for size in indices(self.tensors[tensor].shape))

    def known_shape(self, tensor: int) -> tuple[int, ...] | None:
        """The shape that the trial run found, if it is the same for every input; None for constants."""
        if tensor in self.unsettled or self.is_constant(tensor):
            return None
        return self.facts.shape(tensor)

    def dtype(self, tensor: int) -> str:
        """The type's numpy name, or its name in the format if numpy lacks the type."""
        return TYPE_NAMES.get(self.tensors[tensor].type, "unknown")

    def size_bytes(self, tensor: int) -> int:
        """Bytes of the tensor's values; 0 for types that messages cannot carry."""
        dtype = self.dtype(tensor)
        return prod(self.shape(tensor)) * np.dtype(dtype).itemsize if dtype in TRAVELLING else 0

    @cached_property
    def names(self) -> list[str]:
        """A unique name for every tensor: the name in the file, with `#INDEX` added if it is repeated or empty."""
        plain = [text(tensor.name) for tensor in self.tensors]
        counts: dict[str, int] = {}
        for name in plain:
            counts[name] = counts.get(name, 0) + 1
        return [name if name and counts[name] == 1 else f"{name}#{index}" for index, name in enumerate(plain)]

    @cached_property
    def input_aliases(self) -> dict[str, str]:
        """Name of each input tensor -> its name in the model's first signature."""
        named = [entry for entry in self.model.signatureDefs or [] if entry.subgraphIndex == 0]
        return {self.names[entry.tensorIndex]: text(entry.name) for entry in (named[0].inputs or [] if named else [])}

    def spec(self, tensor: int) -> TensorSpec:
        """The tensor's description in messages."""
        quantization = self.tensors[tensor].quantization
        scales = () if quantization is None else tuple(float(scale) for scale in indices_or_none(quantization.scale))
        zeros = () if quantization is None else tuple(int(zero) for zero in indices_or_none(quantization.zeroPoint))
        return TensorSpec(
            name=self.names[tensor],
            dtype=self.dtype(tensor),
            shape=self.shape(tensor),
            scales=scales,
            zero_points=zeros if scales else (),
            quantized_dimension=quantization.quantizedDimension if scales else 0,
        )

    def buffer(self, index: int) -> memoryview | None:
        """The bytes of a buffer as a view of the file; None if it is empty."""
        return stored_bytes(self.model, self._data, index)

    def is_constant(self, tensor: int) -> bool:
        """Whether the file contains the tensor's values."""
        found = self.tensors[tensor]
        if tensor in self._without_elements:
            return True
        return not found.isVariable and self.buffer(found.buffer) is not None

    def maker(self, tensor: int) -> int | None:
        """The operator that makes the tensor; None for inputs and constants."""
        return self._makers.get(tensor)

    def outputs_of(self, operator: int) -> list[int]:
        """The tensors that an operator makes."""
        return indices(self.operators[operator].outputs)

    # --- layers --------------------------------------------------------------------------------------------------

    def _classified(self) -> tuple[frozenset[int], frozenset[int]]:
        """The carried operators (see the module docstring), and the tensors whose shape depends on the input's values.

        The runtime reports every computed shape as dynamic, even one computed from constant shapes. Such a shape counts as
        fixed if its computation reads no values that vary with the input and both runs of the trial found the same shape.
        """
        late = self.facts.late
        fixed = {at for at in range(len(self.tensors)) if self.is_constant(at)}
        carried: set[int] = set()
        unsettled: set[int] = set()
        for at, operator in enumerate(self.operators):
            kind, inputs, outputs = self.kinds[at], indices(operator.inputs), indices(operator.outputs)
            if self._is_repeatable(at, kind, [t for t in inputs if t >= 0], fixed, unsettled):
                carried.add(at)
                fixed.update(outputs)
                continue
            if kind in SHAPED_BY_VALUES or any(
                inputs[k] >= 0 and inputs[k] not in fixed for k in SHAPED_BY.get(kind, ()) if k < len(inputs)
            ):
                unsettled.update(outputs)
                continue
            # Only the trial run can tell whether these operators give every input the same shape.
            doubtful = kind.startswith("CUSTOM:") or subgraphs_of(operator, kind) or unsettled.intersection(inputs)
            unsettled.update(t for t in outputs if t in late and (doubtful or late[t] is None))
        return frozenset(carried), frozenset(unsettled)

    def _is_repeatable(self, at: int, kind: str, inputs: list[int], fixed: set[int], unsettled: set[int]) -> bool:
        """Whether the operator gives the same result in every slice and for every model input."""
        if kind in HANDLES or kind == "CALL_ONCE":
            return True
        if kind == "READ_VARIABLE":
            return not self.resources_of(at) & self.written_resources
        if kind in SHAPE_READERS and inputs and inputs[0] not in unsettled:
            # a fixed shape is a constant; the slicer stores its value
            return inputs[0] in self.facts.shapes or inputs[0] in self.facts.late
        if (
            kind in UNREPEATABLE
            or kind in WRITERS
            or kind.startswith("CUSTOM:")
            or subgraphs_of(self.operators[at], kind)
        ):
            return False
        return bool(inputs) and all(tensor in fixed for tensor in inputs)

    def _flattens(self) -> dict[int, int]:
        """FULLY_CONNECTED operator -> the RESHAPE that belongs to its layer (see the module docstring)."""
        reads = Counter(tensor for operator in self.operators for tensor in indices(operator.inputs))
        reads.update(self.outputs)
        found = {}
        for at, kind in enumerate(self.kinds):
            for flat in indices(self.operators[at].inputs)[:1] if kind == "FULLY_CONNECTED" else []:
                maker = self._makers.get(flat)
                if maker is not None and reads[flat] == 1 and self._only_flattens(maker, flat):
                    found[at] = maker
        return found

    def _only_flattens(self, at: int, made: int) -> bool:
        """Whether the operator is a RESHAPE that keeps the first dimension and makes one of all others, for every input."""
        if self.kinds[at] != "RESHAPE" or at in self.carried or made in self.unsettled:
            return False
        before, after = self.shape(indices(self.operators[at].inputs)[0]), self.shape(made)
        return len(before) > len(after) == 2 and before[0] == after[0]

    @cached_property
    def layers(self) -> list[Layer]:
        """Layers 1..l."""
        seen: dict[str, int] = {"input": 1}
        layers = []
        for position, (*_, at) in enumerate(self.layer_operators, start=1):
            operator, kind = self.operators[at], self.kinds[at]
            outputs = indices(operator.outputs)
            stem = text(self.tensors[outputs[0]].name).split(";")[0].strip() if outputs else ""
            stem = stem or f"{kind.lower().replace(':', '_')}_{position}"
            seen[stem] = seen.get(stem, 0) + 1
            name = stem if seen[stem] == 1 else f"{stem}#{seen[stem]}"
            made = sum(self.size_bytes(tensor) for tensor in outputs)
            layers.append(Layer(position, name, kind, at, self._work(operator, kind), made))
        return layers

    def _work(self, operator: Any, kind: str) -> float:
        shapes = [self.shape(tensor) if tensor >= 0 else None for tensor in indices(operator.inputs)]
        work = multiply_accumulates(kind, shapes, [self.shape(tensor) for tensor in indices(operator.outputs)])
        for _, index in subgraphs_of(operator, kind):
            graph = self.model.subgraphs[index]
            for inner in graph.operators or []:
                inner_kind = kind_of(self.model.operatorCodes[inner.opcodeIndex])
                sizes = [
                    [tuple(indices(graph.tensors[tensor].shape)) if tensor >= 0 else None for tensor in indices(side)]
                    for side in (inner.inputs, inner.outputs)
                ]
                work += multiply_accumulates(inner_kind, sizes[0], [size for size in sizes[1] if size is not None])
        return work

    @property
    def depth(self) -> int:
        """l, the number of layers."""
        return len(self.layer_operators)

    # --- positions -----------------------------------------------------------------------------------------------

    @cached_property
    def _spans(self) -> dict[int, tuple[int, int]]:
        """tensor -> (position from which it exists, last layer that reads it, or l + 1 for a model output)."""
        begins = dict.fromkeys(self.inputs, 0)
        ends: dict[int, int] = {}
        for position, operators in enumerate(self.layer_operators, start=1):
            for at in operators:
                for tensor in indices(self.operators[at].inputs):
                    if tensor >= 0:
                        ends[tensor] = position
                for tensor in self.outputs_of(at):
                    begins[tensor] = position
        for tensor in self.outputs:
            ends[tensor] = self.depth + 1
        return {tensor: (begin, ends[tensor]) for tensor, begin in begins.items() if tensor in ends}

    def live(self, position: int) -> tuple[int, ...]:
        """The tensors that cross `position`: inputs at 0 and outputs at l, in the model's order; elsewhere in file order."""
        if position == 0:
            return self.inputs
        if position == self.depth:
            return self.outputs
        return tuple(sorted(t for t, (begin, end) in self._spans.items() if begin <= position < end))

    @cached_property
    def blocked(self) -> dict[int, str]:
        """The positions in 1..l-1 where the model cannot be cut, with the reason."""
        reasons: dict[int, str] = {}
        for name, first, last in self._stateful_spans():
            for position in range(first, last):
                reasons.setdefault(position, f"layers {first} to {last} share the state {name}")
        for position in range(1, self.depth):
            for at in self.layer_operators[position - 1]:
                kind = self.kinds[at].removeprefix("CUSTOM:")
                if kind in self.facts.missing_kernels:
                    reasons.setdefault(
                        position, f"layer {position} is the operator {kind}, for which there is no kernel"
                    )
            for tensor in self.live(position):
                why = self._why_confined(tensor)
                if why is not None:
                    reasons.setdefault(position, f"{self.names[tensor]} {why}")
                    break
        return reasons

    def _why_confined(self, tensor: int) -> str | None:
        """The reason why the tensor cannot cross a cut; None if it can."""
        if self.dtype(tensor) not in TRAVELLING:
            return f"is of type {self.dtype(tensor)}, which messages cannot carry"
        if tensor in self.unsettled:
            return "has a shape that is known only at run time"
        if self.facts.shape(tensor) is None and any(size < 1 for size in self.shape(tensor)):
            return "has a shape that the file does not fix"
        return None

    def require_cuttable(self, position: int) -> None:
        """Raises `CutError` if the model cannot be cut at `position`."""
        if not 0 <= position <= self.depth:
            raise CutError(f"{self.path} has positions 0 to {self.depth}, not {position}")
        if position in self.blocked:
            raise CutError(f"{self.path} cannot be cut at {position}: {self.blocked[position]}")

    def manifest(self, name: str, sha256: str, size_bytes: int) -> ModelManifest:
        """The model's description in messages: its name, its hash and its positions."""
        cuts = []
        for position in range(self.depth + 1):
            layer = self.layers[position - 1] if position else None
            tensors = tuple(self.spec(tensor) for tensor in self.live(position))
            cuts.append(
                CutPoint(
                    position=position,
                    name=layer.name if layer else "input",
                    tensors=tensors,
                    cut_bytes=sum(self.size_bytes(tensor) for tensor in self.live(position)),
                    cuttable=position not in self.blocked,
                    reason=self.blocked.get(position, ""),
                    work=layer.work if layer else 0.0,
                )
            )
        return ModelManifest(model=name, sha256=sha256, size_bytes=size_bytes, cuts=tuple(cuts))

    # --- state ---------------------------------------------------------------------------------------------------

    def resources_of(self, at: int) -> frozenset[str]:
        """Names of the state that operator `at` of the main subgraph uses, through handles or in its subgraphs."""
        operator, kind = self.operators[at], self.kinds[at]
        found = {self._handle_name(operator, kind)} if kind in HANDLES else set()
        for tensor in indices(operator.inputs):
            maker = self._makers.get(tensor)
            if maker is not None and maker < at and self.kinds[maker] in HANDLES:
                found.add(self._handle_name(self.operators[maker], self.kinds[maker]))
        for _, index in subgraphs_of(operator, kind):
            found |= self._inner_resources(index)[0]
        return frozenset(found)

    def _inner_resources(self, index: int) -> tuple[set[str], bool]:
        """Names of the state used in a subgraph and the subgraphs it runs, and whether any of them writes state."""
        found: set[str] = set()
        writes = False
        for operator in self.model.subgraphs[index].operators or []:
            kind = kind_of(self.model.operatorCodes[operator.opcodeIndex])
            writes |= kind in WRITERS
            if kind in HANDLES:
                found.add(self._handle_name(operator, kind))
            for _, below in subgraphs_of(operator, kind):
                deeper, deeper_writes = self._inner_resources(below)
                found |= deeper
                writes |= deeper_writes
        return found, writes

    @cached_property
    def written_resources(self) -> frozenset[str]:
        """Names of the state that the main subgraph writes after initialisation, directly or in control flow."""
        written: set[str] = set()
        for at, operator in enumerate(self.operators):
            kind = self.kinds[at]
            if kind in WRITERS:
                written |= self.resources_of(at)
            elif kind != "CALL_ONCE" and any(self._inner_resources(i)[1] for _, i in subgraphs_of(operator, kind)):
                # the subgraph may receive any of the operator's handles, so all its state counts as written
                written |= self.resources_of(at)
        return frozenset(written)

    @staticmethod
    def _handle_name(operator: Any, kind: str) -> str:
        options = operator.builtinOptions
        if kind == "VAR_HANDLE":
            return (
                "/".join(filter(None, (text(options.container), text(options.sharedName)))) if options else "variable"
            )
        return f"table {options.tableId}" if options else "table"

    def _stateful_spans(self) -> Iterable[tuple[str, int, int]]:
        """(name, first layer, last layer) for each written state; these layers must stay in one slice."""
        spans: dict[str, list[int]] = {}
        written = self.written_resources
        for position, operators in enumerate(self.layer_operators, start=1):
            for at in operators:
                for name in self.resources_of(at) & written:
                    spans.setdefault(name, []).append(position)
                for tensor in indices(self.operators[at].inputs):
                    if tensor >= 0 and self.tensors[tensor].isVariable:
                        spans.setdefault(self.names[tensor], []).append(position)
        return [(name, positions[0], positions[-1]) for name, positions in sorted(spans.items())]

    @cached_property
    def stateful(self) -> bool:
        """Whether a sample's result may depend on earlier samples."""
        return bool(list(self._stateful_spans()))


def indices(vector: Any) -> list[int]:
    """A vector of the object API as a list of ints; empty if absent."""
    return [] if vector is None else [int(item) for item in vector]


def indices_or_none(vector: Any) -> list[Any]:
    """A numeric vector of the object API as a list; empty if absent."""
    return [] if vector is None or isinstance(vector, int) else list(vector)
