"""A model that was read, hashed and checked: the bytes that were hashed are the bytes that are used."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bus.errors import ModelError
from bus.values import ModelManifest
from stages.cache import Progress, cache_dir, write_whole
from stages.facts import RuntimeFacts
from stages.flatfile import ModelBytes, forget_pages
from stages.graph import Graph
from stages.trial import trial
from stages.validation import validated

KEPT_IN_MEMORY_BYTES = 64 << 20
"""Files up to this size are read; larger ones are copied to the cache, out of reach of their owner, and mapped."""

PIECE_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class Model:
    """A `.tflite` model. `data` never changes: it is in memory, or mapped from a file of our own cache."""

    name: str  # the name that messages use
    path: Path  # where the user, or the zoo, has it
    sha256: str  # of `data`
    data: ModelBytes = field(repr=False)  # the file
    kept: Path | None = field(default=None, repr=False)  # the file in our cache that `data` maps; None where in memory
    facts: RuntimeFacts = field(default_factory=RuntimeFacts, repr=False)  # what a trial run showed
    trusted: bool = False  # whether it is DeePar's own, which needs no trial runs

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return len(self.data)

    @cached_property
    def graph(self) -> Graph:
        """The operators and tensors, analysed for cutting."""
        return Graph.of(self.data, str(self.path), self.facts)

    @cached_property
    def manifest(self) -> ModelManifest:
        """Positions, what crosses them, and the hash: what a node announces."""
        try:
            return self.graph.manifest(self.name, self.sha256, self.size_bytes)
        except ValueError as error:
            raise ModelError(str(self.path), f"cannot be described: {error}") from error

    @property
    def source(self) -> Path | bytes:
        """What a runner loads to run the whole model: the very bytes that were hashed."""
        if isinstance(self.data, bytes):
            return self.data
        assert self.kept is not None
        return self.kept

    def __hash__(self) -> int:
        return hash(self.sha256)


def model_name(path: Path) -> str:
    """A name that messages can carry, from a file's."""
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", path.name.removesuffix(".tflite")).strip("-._+")
    return name[:100] or "model"


def read_model(
    path: Path,
    *,
    name: str | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
    trusted: bool = False,
) -> Model:
    """Reads, hashes and validates a model file, and runs it once in a process of its own unless it is `trusted`.

    Raises `ModelError` where the file is missing, unreadable, not a model, truncated, inconsistent, larger than a flatbuffer
    can be, or does not have the hash that was asked for.
    """
    shown = str(path)
    try:
        # without O_NONBLOCK, opening a pipe would wait for a writer for ever
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
        if status.st_size <= KEPT_IN_MEMORY_BYTES:
            data = b"".join(iter(lambda: file.read(PIECE_BYTES), b""))
            digest = hashlib.sha256(data).hexdigest()
        else:
            # look before copying: gigabytes of something else are refused at once
            if file.read(8)[4:] != b"TFL3":
                raise ModelError(shown, "is not a TensorFlow Lite model (no TFL3 mark)")
            data, digest, kept = _mapped(file.fileno(), path, status.st_size, progress)
    if sha256 is not None and digest != sha256.lower():
        raise ModelError(shown, f"has SHA-256 {digest}, not {sha256.lower()} as asked for")
    validated(data, shown)
    source = data if isinstance(data, bytes) else kept
    facts = RuntimeFacts() if trusted or source is None else trial(source, digest, shown)
    return Model(name or model_name(path), path, digest, data, kept, facts, trusted)


def _mapped(handle: int, path: Path, size_bytes: int, progress: Progress | None) -> tuple[mmap.mmap, str, Path]:
    """The file mapped, from the cache: as it is where it lies there already, else as a copy named by its hash."""
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
