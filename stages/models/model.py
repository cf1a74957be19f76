"""A model file that has been read, hashed and validated.

The bytes that were hashed are the bytes that run: a small file stays in memory, a large one is copied to the cache and mapped
from there, so a later change of the user's file has no effect.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ai_edge_litert import schema_py_generated as schema

from bus.errors import ModelError
from bus.values import ModelManifest
from stages.models.files.cache import Progress, cache_dir, write_whole
from stages.models.files.choice import ModelChoice, shape_words
from stages.models.files.flatbuffer_writer import Chunk, ModelBytes, forget_pages, tflite_chunks
from stages.models.files.validation import validated
from stages.models.graph import Graph
from stages.models.runtime.facts import RuntimeFacts
from stages.models.runtime.trial_run import trial
from stages.models.variants import Contents, chosen_hash, contents, rewritten

KEPT_IN_MEMORY_BYTES = 64 << 20
"""Files up to this size are read into memory; larger ones are copied to the cache and mapped."""

PIECE_BYTES = 1 << 24
"""Size of one read."""


@dataclass(frozen=True, eq=False)
class Model:
    """A `.tflite` model. `data` never changes: it is in memory, or mapped from a file in the cache."""

    name: str  # the name that messages use
    path: Path  # the file of the user or the zoo
    sha256: str  # hash of the file, or of the file and the choice if the user chose a signature or shapes
    data: ModelBytes = field(repr=False)  # the content of the file
    kept: Path | None = field(default=None, repr=False)  # the cached file that `data` maps; None if in memory
    facts: RuntimeFacts = field(default_factory=RuntimeFacts, repr=False)  # findings of the trial run
    trusted: bool = False  # whether it belongs to DeePar and needs no trial runs
    file_sha256: str = ""  # of the user's file
    contents: Contents = field(
        default_factory=Contents, repr=False
    )  # its signatures, its parts outside the chosen signature, its inputs of open shape

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return len(self.data)

    @cached_property
    def graph(self) -> Graph:
        """The operators and tensors, prepared for cutting."""
        return Graph.of(self.data, str(self.path), self.facts)

    @cached_property
    def manifest(self) -> ModelManifest:
        """The positions, the tensors that cross them, and the hash, as a node announces them."""
        try:
            return self.graph.manifest(self.name, self.sha256, self.size_bytes)
        except ValueError as error:
            raise ModelError(str(self.path), f"has a layer or tensor that messages cannot describe: {error}") from error

    @property
    def source(self) -> Path | bytes:
        """The path or bytes that a runner loads to run the whole model: exactly the content that was hashed."""
        if isinstance(self.data, bytes):
            return self.data
        assert self.kept is not None
        return self.kept

    def __hash__(self) -> int:
        return hash(self.sha256)


def model_name(path: Path) -> str:
    """A name that messages can carry, derived from the file name."""
    return clean_name(path.name.removesuffix(".tflite"))


def clean_name(words: str) -> str:
    """The text with a dash in place of each character that a model name may not contain."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", words).strip("-._+")[:100] or "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """What is known about a model file before it is read."""

    name: str | None = None  # the model's name; None: derived from the file name
    sha256: str | None = None  # the hash that the file must have; None: any
    trusted: bool = False  # whether to skip the trial run in a process of its own


UNKNOWN_FILE = KnownFile()


def read_model(
    path: Path,
    known: KnownFile = UNKNOWN_FILE,
    *,
    progress: Progress | None = None,
    choice: ModelChoice | None = None,
    in_memory_bytes: int = KEPT_IN_MEMORY_BYTES,
) -> Model:
    """Reads, hashes and validates a model file, and runs it once in a process of its own unless it is trusted.

    A file larger than `in_memory_bytes` is copied to the cache and mapped. `choice` selects a signature and input shapes. A
    signature outside the main subgraph changes the model's name to `NAME.SIGNATURE`. Raises `UnknownNameError` or
    `ConfigError` if the file does not offer the choice, and `ModelError` if the file is missing, unreadable, not a model,
    truncated, inconsistent, too large for a flatbuffer, or its hash is not the known one.
    """
    shown = str(path)
    try:
        # O_NONBLOCK: without it, opening a named pipe blocks until a writer appears
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise ModelError(shown, f"cannot be opened: {error.strerror}") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise ModelError(shown, "is not a regular file")
    with open(handle, "rb", buffering=0) as file:
        if status.st_size < 16:
            raise ModelError(shown, f"has {status.st_size} bytes, too few for a model")
        data: ModelBytes
        kept: Path | None = None
        if status.st_size <= in_memory_bytes:
            data = b"".join(iter(lambda: file.read(PIECE_BYTES), b""))
            digest = hashlib.sha256(data).hexdigest()
        else:
            # check the identifier before copying gigabytes
            if file.read(8)[4:] != b"TFL3":
                raise ModelError(shown, "is not a TensorFlow Lite model (no TFL3 mark)")
            data, digest, kept = _mapped(file.fileno(), path, status.st_size, progress)
    if known.sha256 is not None and digest != known.sha256.lower():
        raise ModelError(shown, f"has SHA-256 {digest}, not {known.sha256.lower()} as asked for")
    validated(data, shown)
    name = known.name or model_name(path)
    return _as_chosen(
        Model(name, path, digest, data, kept, file_sha256=digest, trusted=known.trusted), choice or ModelChoice()
    )


def _as_chosen(model: Model, choice: ModelChoice) -> Model:
    """Applies the choice, then runs the model once in a child process unless it is trusted and unchanged."""
    shown = str(model.path)
    unpacked = schema.ModelT.InitFromPackedBuf(model.data, 0)
    found = contents(unpacked, choice, shown)
    sha256 = chosen_hash(model.sha256, unpacked, choice, shown)
    if sha256 != model.sha256:
        blobs = rewritten(unpacked, model.data, choice, shown)
        data, kept = _stored(tflite_chunks(unpacked, blobs), sha256, model.size_bytes)
        validated(data, shown)
        model = replace(model, sha256=sha256, data=data, kept=kept, trusted=False)
    if found.main:
        model = replace(model, name=clean_name(f"{model.name}.{found.meant}"))
    model = replace(model, contents=found)
    return model if model.trusted else replace(model, facts=_tried(model, choice))


def _tried(model: Model, choice: ModelChoice) -> RuntimeFacts:
    """The findings of a trial run. A `ModelError` names the shapes that the user gave and the inputs of open shape."""
    try:
        return trial(model.source, model.sha256, str(model.path))
    except ModelError as error:
        words = [f"{name} was given as {shape_words(shape)}" for name, shape in choice.input_shapes.items()]
        words += [
            f"{one.name} is open, {one.words}, and was run at {shape_words(one.declared)}"
            for one in model.contents.open_inputs
        ]
        if not words:
            raise
        fault = f"{error.fault.rstrip('.')}; its input {', '.join(words)}"
        raise ModelError(error.path, fault, remedy=model.contents.remedy) from error


def _stored(chunks: Iterable[Chunk], sha256: str, size_bytes: int) -> tuple[ModelBytes, Path | None]:
    """Stores a generated file: in memory, or mapped from the cache if it is large."""
    if size_bytes <= KEPT_IN_MEMORY_BYTES:
        return b"".join(bytes(chunk) for chunk in chunks), None
    kept = cache_dir("models") / f"{sha256}.tflite"
    write_whole(kept, chunks, size_bytes=size_bytes, durable=False)
    with open(kept, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), kept


def _mapped(handle: int, path: Path, size_bytes: int, progress: Progress | None) -> tuple[mmap.mmap, str, Path]:
    """Maps the file and hashes it. A file outside the cache is first copied there, under its hash as name."""
    own = cache_dir("models").resolve()
    if own in path.resolve().parents:
        mapped = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
        digest = hashlib.sha256()
        with memoryview(mapped) as view:
            for start in range(0, size_bytes, PIECE_BYTES):
                digest.update(view[start : start + PIECE_BYTES])
                if progress is not None:
                    progress(f"checking {path.name}", min(start + PIECE_BYTES, size_bytes), size_bytes)
        forget_pages(mapped)  # hashing touched every page
        return mapped, digest.hexdigest(), path

    def pieces() -> Iterator[bytes]:
        offset = 0
        while piece := os.pread(handle, PIECE_BYTES, offset):
            offset += len(piece)
            yield piece

    copy = own / f"copy-{os.getpid()}-{threading.get_ident()}"
    digest_hex = write_whole(copy, pieces(), size_bytes=size_bytes, progress=progress, durable=False)
    kept = own / f"{digest_hex}.tflite"
    os.replace(copy, kept)
    with contextlib.suppress(OSError):
        os.chmod(kept, 0o400)
    with open(kept, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), digest_hex, kept
