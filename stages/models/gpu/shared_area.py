"""Memory that a node and its GPU process share: the inputs of one batch, then its outputs."""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np

from bus.tensors import Array

ALIGNED_BYTES = 64


class SharedArea:
    """A file without a name, mapped by both processes. It grows to the largest batch of all files."""

    def __init__(self, descriptor: int | None = None) -> None:
        """`descriptor` is that of the other process's area, which this process inherited; None makes a new area."""
        self.descriptor = _anonymous_file() if descriptor is None else descriptor
        self._map: mmap.mmap | None = None

    def grow(self, input_bytes: int, output_bytes: int) -> None:
        """Make room for a batch. Raises `OSError` if memory lacks."""
        size_bytes = max(1, _aligned(input_bytes) + output_bytes)
        if self._map is not None and len(self._map) >= size_bytes:
            return
        if os.fstat(self.descriptor).st_size < size_bytes:
            os.ftruncate(self.descriptor, size_bytes)
        self._map = mmap.mmap(self.descriptor, size_bytes)  # views of the old mapping stay valid

    def halves(self, input_bytes: int, output_bytes: int) -> tuple[Array, Array]:
        """The values of the inputs and of the outputs, as float32; both are views."""
        assert self._map is not None, "call grow first"
        begin = _aligned(input_bytes)
        values = np.frombuffer(self._map, np.float32, (begin + output_bytes) // 4)
        return values[: input_bytes // 4], values[begin // 4 :]

    def close(self) -> None:
        """Free the memory; harmless the second time."""
        self._map = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _aligned(size_bytes: int) -> int:
    """Where the outputs begin: `size_bytes` of inputs, rounded up to the alignment."""
    return -(-size_bytes // ALIGNED_BYTES) * ALIGNED_BYTES


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("deepar-gpu")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
