"""Cuts pieces out of a model and loads them: small ones from memory, larger ones from files in the cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from stages.models.files.cache import write_whole
from stages.models.files.flatbuffer_writer import forget_pages
from stages.models.model import Model
from stages.models.runtime.litert import InterpreterOptions, SegmentRunner
from stages.models.sandbox import Sandbox
from stages.models.segments.loaded_piece import LoadedPiece
from stages.models.slicer import SlicedPart, slice_model


class PieceLoader:
    """Loads the pieces of one model. The sandbox admits each piece before it is loaded."""

    def __init__(
        self, model: Model, folder: Path, options: InterpreterOptions, sandbox: Sandbox, in_memory_bytes: int
    ) -> None:
        """`in_memory_bytes`: the largest piece without a file."""
        self._model = model
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._options = options
        self._sandbox = sandbox
        self._in_memory_bytes = in_memory_bytes
        self._weight_factor = weight_factor(options)

    def load(self, begin: int, end: int) -> LoadedPiece:
        """Cuts and loads layers begin+1..end. Raises `ModelError` if the disk is full or the runtime refuses the piece."""
        part = slice_model(self._model, begin + 1, end)
        source: Path | bytes
        small = part.size_bytes <= self._in_memory_bytes
        if small:
            source = part.to_bytes()
        else:
            source = self._path(begin, end)
            if not _holds(source, part):
                write_whole(source, part.chunks(), size_bytes=part.size_bytes, durable=False)
            forget_pages(self._model.data)  # the pages were needed only for the copy
        self._sandbox.admit(part, source)

        def open_piece() -> SegmentRunner:
            title = f"{self._model.name} {begin + 1}..{end}"
            return SegmentRunner(
                source, self._options.num_threads, delegate=self._options.delegate, title=title, renew=part.renew
            )

        size_bytes = self._weight_factor * part.size_bytes + self.tensor_bytes(begin, end)
        return LoadedPiece(part, open_piece, size_bytes, keep=self._options.delegate or small)

    def tensor_bytes(self, begin: int, end: int) -> int:
        """Estimated memory of one sample's tensors in the piece: those at its ends and its two largest inner ones."""
        graph = self._model.graph
        inner = sorted(
            (out for layer in graph.layers[begin:end] for out in graph.outputs_of(layer.operator)),
            key=graph.size_bytes,
            reverse=True,
        )
        return sum(map(graph.size_bytes, {*graph.live(begin), *graph.live(end), *inner[:2]}))

    def _path(self, begin: int, end: int) -> Path:
        return self._folder / f"{begin + 1}-{end}.tflite"

    def delete(self, begin: int, end: int) -> None:
        """Removes the file of a piece."""
        # an interpreter that maps the file keeps its content until it is closed
        with contextlib.suppress(OSError):
            self._path(begin, end).unlink()


def weight_factor(options: InterpreterOptions) -> int:
    """How many copies of its weights a loaded piece holds: the delegate repacks them."""
    return 2 if options.delegate else 1


def _holds(path: Path, part: SlicedPart) -> bool:
    """Whether an existing file is this part: it has the same structure in front and the same size."""
    head = bytes(next(iter(part.chunks())))
    try:
        with open(path, "rb") as file:
            return file.read(len(head)) == head and os.fstat(file.fileno()).st_size == part.file_bytes(len(head))
    except OSError:
        return False
