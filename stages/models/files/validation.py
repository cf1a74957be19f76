"""Validation of `.tflite` files, before the runtime reads offsets and numbers that it does not check itself.

It has two passes. `_Walk` checks the flatbuffer format: every table, vector and string lies inside the file. `_check` checks
the meaning: indices refer to existing objects, operators follow the operators whose results they read, constants have the
size of their shape, tensors are not too large. Faults that only the runtime can find, such as strides of zero, are left to
the trial run in a child process (`stages.models.runtime.trial_run`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from math import prod
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from bus.errors import ModelError
from stages.models.files.flatbuffer_writer import FILE_IDENTIFIER, ModelBytes
from stages.models.files.operators import ITEM_BITS, KINDS, constants_without_elements, kind_of, subgraphs_of, text
from stages.models.files.quantization_details import details_of, elements, named_tensors
from stages.models.files.schema_layout import Field, tables

MOST_TABLES = 400_000
"""Maximum number of tables, above any real model; it limits the time spent on a file that repeats references."""

MOST_RANK = 8
LARGEST_TENSOR_BYTES = 1 << 31
"""Maximum size of one tensor, because the runtime would try to allocate a larger one."""

LARGEST_SUM_BYTES = 1 << 36
"""Maximum size of all tensors of a subgraph together."""


class _Fault(Exception):
    """A fault of the file, as a predicate: the error text puts the file's name before it."""


def validated(data: ModelBytes, shown: str) -> None:
    """Raises `ModelError` with the file's name and the fault if the file is invalid."""
    try:
        if data[4:8] != FILE_IDENTIFIER:
            raise _Fault("is not a TensorFlow Lite model (no TFL3 mark)")
        _Walk(data).model()
        _check(schema.ModelT.InitFromPackedBuf(data, 0), len(data))
    except _Fault as fault:
        raise ModelError(shown, str(fault)) from None
    except (struct.error, ValueError, IndexError, OverflowError, TypeError, AttributeError) as error:
        # a fault that the walk missed: an error of the generated reader also means that the file is damaged
        raise ModelError(shown, f"is damaged ({type(error).__name__}: {error})") from error


class _Walk:
    """Follows every offset of a flatbuffer."""

    def __init__(self, data: ModelBytes) -> None:
        self._data = data
        self._size = len(data)
        self._tables = tables()
        self._seen = 0
        self._sound: set[tuple[int, str]] = set()

    def model(self) -> None:
        """Checks the whole file, starting at its root."""
        self._table(self._offset(0, "the root"), "Model")

    def _read(self, form: str, at: int, what: str) -> int:
        width = struct.calcsize(form)
        if not 0 <= at <= self._size - width:
            raise _Fault(f"points outside itself: {what} would be at byte {at:,} of {self._size:,}")
        return int(struct.unpack_from(form, self._data, at)[0])

    def _offset(self, at: int, what: str) -> int:
        step = self._read("<I", at, what)
        target = at + step
        if step == 0 or target > self._size - 4:
            raise _Fault(f"points outside itself: {what} leads to byte {target:,} of {self._size:,}")
        return target

    def _table(self, at: int, name: str) -> None:
        if (at, name) in self._sound:
            return
        self._sound.add((at, name))
        self._seen += 1
        if self._seen > MOST_TABLES:
            raise _Fault(f"has more than {MOST_TABLES:,} tables")
        vtable = at - self._read("<i", at, name)
        vtable_size = self._read("<H", vtable, f"the layout of {name}")
        table_size = self._read("<H", vtable + 2, f"the layout of {name}")
        if vtable_size < 4 or vtable_size % 2 or vtable + vtable_size > self._size:
            raise _Fault(f"has a broken layout for {name} at byte {vtable:,}")
        if table_size < 4 or at + table_size > self._size:
            raise _Fault(f"is truncated or points outside itself: {name} at byte {at:,} has {table_size:,} bytes")
        slots = struct.unpack_from(f"<{(vtable_size - 4) // 2}H", self._data, vtable + 4)
        for slot, field in self._tables[name].items():
            inner = slots[slot] if slot < len(slots) else 0
            if inner == 0:
                continue
            what = f"{name}.{field.name}"
            if inner < 4 or inner + field.width > table_size:
                raise _Fault(f"has {what} outside its table at byte {at:,}")
            if field.is_offset:
                kind = self._read("<B", at + slots[slot - 1], what) if field.union and slots[slot - 1] else 0
                self._follow(at + inner, field, what, kind)

    def _follow(self, at: int, field: Field, what: str, kind: int) -> None:
        target = self._offset(at, what)
        if field.union:
            table = field.union[kind] if kind < len(field.union) else None
            if table is None:
                raise _Fault(f"has {what} of the unknown kind {kind}")
            self._table(target, table)
        elif field.table is not None and not field.is_vector:
            self._table(target, field.table)
        else:
            count = self._read("<I", target, what)
            if target + 4 + count * field.element_width > self._size:
                raise _Fault(f"is truncated or points outside itself: {what} has {count:,} elements at byte {target:,}")
            if field.is_text and self._read("<B", target + 4 + count, what) != 0:
                raise _Fault(f"has {what} without an end at byte {target:,}")
            if field.table is not None:
                if self._seen + count > MOST_TABLES:
                    raise _Fault(f"has more than {MOST_TABLES:,} tables")
                for index in range(count):
                    element = target + 4 + 4 * index
                    self._table(self._offset(element, f"{what}[{index}]"), field.table)


def _ints(vector: Any) -> list[int]:
    return [] if vector is None else [int(item) for item in vector]


def _need(condition: bool, fault: str) -> None:
    if not condition:
        raise _Fault(fault)


def _check_text(raw: Any, what: str) -> None:
    """Rejects a name that is not UTF-8, because the runtime's Python API cannot read it."""
    try:
        (raw or b"").decode("utf-8")
    except UnicodeDecodeError:
        raise _Fault(f"has {what} that is not UTF-8: {text(raw)[:40]}") from None


def _check(model: Any, size_bytes: int) -> None:
    _need(model.version == 3, f"is of schema version {model.version}, not 3")
    _need(bool(model.subgraphs), "has no subgraph")
    _need(bool(model.operatorCodes), "has no operator codes")
    buffers = model.buffers or []
    for index, buffer in enumerate(buffers):
        if buffer.offset > 1:
            end = buffer.offset + buffer.size
            _need(end <= size_bytes, f"points outside itself: buffer {index} ends at byte {end:,} of {size_bytes:,}")
    outside = bool(model.externalBuffers or model.externalBufferGroups)
    outside |= any(tensor.externalBuffer for graph in model.subgraphs for tensor in graph.tensors or [])
    _need(not outside, "keeps weights in another file, which is not supported")
    for code in model.operatorCodes:
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        _need(number in KINDS, f"has an operator of unknown code {number}")
        _check_text(code.customCode, "a custom operator's name")
    for number, graph in enumerate(model.subgraphs):
        _Subgraph(model, number, graph).check()
    _check_no_recursion(model)
    for entry in model.metadata or []:
        there = 0 <= entry.buffer < len(buffers)
        _need(there, f"has metadata {text(entry.name)} in buffer {entry.buffer}, which is not there")
    for entry in model.signatureDefs or []:
        key = text(entry.signatureKey)
        _check_text(entry.signatureKey, "a signature's name")
        _need(0 <= entry.subgraphIndex < len(model.subgraphs), f"has signature {key} for a subgraph that is not there")
        tensors = model.subgraphs[entry.subgraphIndex].tensors or []
        for name in (*(entry.inputs or []), *(entry.outputs or [])):
            _check_text(name.name, "a name in a signature")
            _need(0 <= name.tensorIndex < len(tensors), f"has signature {key} with a tensor that is not there")


class _Subgraph:
    """Checks the meaning of one subgraph."""

    def __init__(self, model: Any, number: int, graph: Any) -> None:
        self._model, self._graph = model, graph
        self._tensors = graph.tensors or []
        self._where = "" if number == 0 else f" of subgraph {number}"

    def check(self) -> None:
        total = 0
        known: set[int] = set()
        for index, tensor in enumerate(self._tensors):
            total += self._tensor(index, tensor)
            if tensor.isVariable or self._has_data(tensor):
                known.add(index)
        _need(total <= LARGEST_SUM_BYTES, f"declares tensors of {total:,} bytes together{self._where}")
        inputs, outputs = _ints(self._graph.inputs), _ints(self._graph.outputs)
        for index in (*inputs, *outputs):
            _need(0 <= index < len(self._tensors), f"has input or output {index}{self._where}, which is not there")
        known.update(constants_without_elements(self._graph))
        constants = {index for index in known if not self._tensors[index].isVariable}
        known.update(inputs)
        for index in range(len(self._tensors)):
            self._details(index, constants)
        self._operators(known, set(inputs))
        for index in outputs:
            _need(index in known, f"has output {self._name(index)}{self._where}, which nothing makes")

    def _operators(self, known: set[int], inputs: set[int]) -> None:
        made: set[int] = set()
        for at, operator in enumerate(self._graph.operators or []):
            _need(
                0 <= operator.opcodeIndex < len(self._model.operatorCodes),
                f"has operator {at}{self._where} of code {operator.opcodeIndex}, which is not there",
            )
            kind = kind_of(self._model.operatorCodes[operator.opcodeIndex])
            for index in _ints(operator.inputs):
                _need(-1 <= index < len(self._tensors), f"has operator {at} ({kind}){self._where} read tensor {index}")
                _need(
                    index == -1 or index in known,
                    f"has operator {at} ({kind}){self._where} read {self._name(index)} before anything makes it",
                )
            for index in _ints(operator.intermediates):
                _need(-1 <= index < len(self._tensors), f"has operator {at} ({kind}){self._where} use tensor {index}")
            for index in _ints(operator.outputs):
                _need(0 <= index < len(self._tensors), f"has operator {at} ({kind}){self._where} make tensor {index}")
                _need(
                    index not in made and index not in inputs and not self._has_data(self._tensors[index]),
                    f"has operator {at} ({kind}){self._where} make {self._name(index)}, which is there already",
                )
                made.add(index)
                known.add(index)
            _need(
                operator.largeCustomOptionsOffset == 0,
                f"keeps options of operator {at}{self._where} behind the model, which is not supported",
            )
            for _, index in subgraphs_of(operator, kind):
                there = 0 <= index < len(self._model.subgraphs)
                _need(there, f"has operator {at} ({kind}){self._where} run subgraph {index}, which is not there")

    def _name(self, index: int) -> str:
        return text(self._tensors[index].name) or f"tensor {index}"

    def _has_data(self, tensor: Any) -> bool:
        buffer = self._model.buffers[tensor.buffer]
        return (isinstance(buffer.data, np.ndarray) and buffer.data.size > 0) or buffer.offset > 1

    def _tensor(self, index: int, tensor: Any) -> int:
        """Checks one tensor and returns the size of its declared shape in bytes."""
        _check_text(tensor.name, "a tensor's name")
        name = f"{text(tensor.name) or f'tensor {index}'}{self._where}"
        buffers = self._model.buffers or []
        _need(0 <= tensor.buffer < len(buffers), f"has {name} in buffer {tensor.buffer}, which is not there")
        _need(tensor.type in set(_ALL_TYPES), f"has {name} of the unknown type {tensor.type}")
        shape = _ints(tensor.shape)
        _need(len(shape) <= MOST_RANK or not self._has_data(tensor), f"has {name} of {len(shape)} dimensions")
        _need(all(size >= -1 for size in shape), f"has {name} of the shape {shape}")
        bits = ITEM_BITS.get(tensor.type)
        size = 0
        if bits is not None:
            size = -(-prod(max(1, extent) if extent < 0 else extent for extent in shape) * bits // 8)
            _need(size <= LARGEST_TENSOR_BYTES, f"declares {name} of the shape {shape}: {size:,} bytes")
        if self._has_data(tensor):
            buffer = buffers[tensor.buffer]
            held = int(buffer.size) if buffer.offset > 1 else int(buffer.data.size)
            if bits is None:
                if tensor.type == schema.TensorType.STRING:
                    _check_strings(buffer.data if buffer.offset <= 1 else None, prod(shape), name)
            elif tensor.sparsity is None:
                _need(held == size, f"has {name} of the shape {shape} with {held:,} bytes instead of {size:,}")
        self._quantization(tensor, shape, name)
        if tensor.sparsity is not None:
            _check_sparsity(tensor.sparsity, shape, name)
        return size

    def _quantization(self, tensor: Any, shape: list[int], name: str) -> None:
        found = tensor.quantization
        if found is None or found.scale is None or isinstance(found.scale, int) or not len(found.scale):
            return
        scales = len(found.scale)
        zeros = 0 if found.zeroPoint is None or isinstance(found.zeroPoint, int) else len(found.zeroPoint)
        _need(zeros in (0, scales), f"has {name} with {scales} scales and {zeros} zero points")
        _need(bool(np.isfinite(found.scale).all()), f"has {name} with a scale that is not a number")
        if scales > 1:
            axis = found.quantizedDimension
            _need(
                0 <= axis < len(shape) and shape[axis] == scales,
                f"has {name} of the shape {shape} with {scales} scales along dimension {axis}",
            )

    def _details(self, index: int, constants: set[int]) -> None:
        """Checks the tensor indices in quantisation details, which the runtime uses unchecked."""
        name = f"{self._name(index)}{self._where}"
        for field, named in named_tensors(self._tensors, index).items():
            words = f"has {name} quantised with {field} in tensor {named}"
            _need(0 <= named < len(self._tensors), f"{words}, which is not there")
            _need(named in constants, f"{words}, which is not a constant")
            _need(named != index, f"{words}, which is itself")
        details = details_of(self._tensors[index])
        if (
            details is None
            or getattr(details, "blockShape", None) is not None
            or hasattr(details, "quantizedDimensions")
        ):
            return  # the runtime checks blocks of several dimensions itself
        weights, scales = self._tensors[index], self._tensors[details.scales]
        count, covered = elements(weights), elements(scales) * int(details.blockSize)
        _need(
            details.blockSize > 0 and covered == count,
            f"has {name} of {count:,} elements with {elements(scales):,} scales for blocks of {details.blockSize}",
        )


_ALL_TYPES = frozenset(code for name, code in vars(schema.TensorType).items() if isinstance(code, int))


def _check_strings(data: Any, count: int, name: str) -> None:
    """Checks a string constant, which consists of a count, count + 1 offsets, and the characters."""
    _need(data is not None and data.size >= 4, f"has strings {name} without their count")
    held = int(data[:4].view("<i4")[0])
    _need(held == count and data.size >= 4 * (count + 2), f"has strings {name} with {held} instead of {count}")
    offsets = data[4 : 4 * (count + 2)].view("<i4")
    ordered = bool((np.diff(offsets) >= 0).all())
    _need(
        ordered and offsets[0] >= 4 * (count + 2) and offsets[-1] <= data.size, f"has strings {name} outside themselves"
    )


def _check_sparsity(sparsity: Any, shape: list[int], name: str) -> None:
    """Checks that the indices of a sparse constant stay inside it, because the runtime expands it unchecked."""
    order, blocks = _ints(sparsity.traversalOrder), _ints(sparsity.blockMap)
    dims = sparsity.dimMetadata or []
    rank = len(shape)
    fault = f"has {name} with a broken sparse layout"
    _need(len(order) == rank + len(blocks) == len(dims) and sorted(order) == list(range(len(order))), fault)
    _need(all(0 <= axis < rank for axis in blocks), fault)
    rows = 1
    for at, dim in enumerate(dims):
        extent = _extent(dims, order, blocks, shape, at, fault)
        if dim.format == 0:
            _need(0 < dim.denseSize == extent, fault)
            rows *= dim.denseSize
        else:
            segments = _values(dim.arraySegments)
            places = _values(dim.arrayIndices)
            _need(segments.size == rows + 1 and int(segments[0]) == 0 and bool((np.diff(segments) >= 0).all()), fault)
            _need(int(segments[-1]) == places.size, fault)
            _need(not places.size or (int(places.min()) >= 0 and int(places.max()) < extent), fault)
            rows = int(places.size)


def _extent(dims: list[Any], order: list[int], blocks: list[int], shape: list[int], at: int, fault: str) -> int:
    """The number of values on the axis of level `at`; an axis split into blocks has its size divided by the block size."""
    axis = order[at]
    sizes = {blocks[order[k] - len(shape)]: int(dims[k].denseSize) for k in range(len(order)) if order[k] >= len(shape)}
    if axis >= len(shape):
        return sizes[blocks[axis - len(shape)]]
    block = sizes.get(axis, 1)
    _need(block > 0 and shape[axis] % block == 0, fault)
    return shape[axis] // block


def _values(vector: Any) -> np.ndarray[Any, Any]:
    values = None if vector is None else vector.values
    return np.asarray([] if values is None or isinstance(values, int) else values, np.int64)


def _check_no_recursion(model: Any) -> None:
    """Rejects a subgraph that runs itself, directly or indirectly, because it would never end."""

    def below(index: int) -> Iterable[int]:
        for operator in model.subgraphs[index].operators or []:
            kind = kind_of(model.operatorCodes[operator.opcodeIndex])
            yield from (inner for _, inner in subgraphs_of(operator, kind))

    done: set[int] = set()
    for start in range(len(model.subgraphs)):
        path: list[tuple[int, list[int]]] = [(start, list(below(start)))]
        active = {start}
        while path:
            index, rest = path[-1]
            if not rest:
                path.pop()
                active.discard(index)
                done.add(index)
                continue
            following = rest.pop()
            _need(following not in active, f"has subgraph {following} run itself")
            if following not in done:
                active.add(following)
                path.append((following, list(below(following))))
