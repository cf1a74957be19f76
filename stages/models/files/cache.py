"""The user's cache folder, with atomic writes and file locks.

`DEEPAR_CACHE_DIR` overrides the folder. A file is written under a temporary name, hashed while it is written, and renamed
when it is complete. A lock file lets a second process wait for a large file instead of writing it again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeAlias

from platformdirs import user_cache_dir

from bus.errors import ConfigError, ModelError

try:
    import fcntl
except ImportError:  # Windows has no fcntl: two processes may both write, but the rename is still atomic
    fcntl = None  # type: ignore[assignment]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Receives a description of the step, the bytes done, and the total bytes."""


def cache_dir(*parts: str) -> Path:
    """Returns a folder of the cache, created for this user only if missing. Raises `ConfigError` if that fails."""
    root = Path(os.environ.get("DEEPAR_CACHE_DIR") or user_cache_dir("deepar"))
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"the cache folder {folder} cannot be created: {error.strerror}",
            remedy="set DEEPAR_CACHE_DIR to a writable folder",
        ) from error
    return folder


def measured_path(name: str, known_by: Iterable[str], ending: str = ".json") -> Path:
    """The file of a measurement on this machine; another one if anything differs in `known_by`."""
    digest = hashlib.sha256("\n".join(known_by).encode()).hexdigest()
    return cache_dir("profiles") / f"{name}-{digest[:16]}{ending}"


@contextlib.contextmanager
def locked(
    path: Path, on_wait: Callable[[], None] | None = None, pause: Callable[[], None] | None = None
) -> Iterator[None]:
    """Locks `path` against other processes of this machine; calls `on_wait` if it must wait for another process.

    With `pause`, it calls that between attempts instead of blocking; an exception of `pause` ends the waiting.
    """
    with open(path.with_name(path.name + ".lock"), "a") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is not None:
                    on_wait()
                while pause is not None and not _free(handle):
                    pause()
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _free(handle: IO[str]) -> bool:
    """Locks an open file unless another process holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_whole(
    path: Path,
    chunks: Iterable[bytes | bytearray | memoryview],
    *,
    size_bytes: int = 0,
    progress: Progress | None = None,
    durable: bool = True,
) -> str:
    """Writes a file atomically and returns its SHA-256.

    `size_bytes`, if given, is first compared with the free space, and is the total that `progress` receives. `durable` syncs
    the file to the disk before the rename. Raises `ModelError` if the disk is full or not writable.
    """
    digest = hashlib.sha256()
    temporary: str | None = None
    try:
        free = shutil.disk_usage(path.parent).free
        if size_bytes > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        written = 0
        with open(handle, "wb", buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                for start in range(0, view.nbytes, 1 << 24):
                    piece = view[start : start + (1 << 24)]
                    digest.update(piece)
                    while piece.nbytes:
                        piece = piece[file.write(piece) :]
                written += view.nbytes
                if progress is not None:
                    progress(f"writing {path.name}", written, max(size_bytes, written))
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        need = f", {size_bytes / 1e6:,.0f} MB are needed" if size_bytes else ""
        raise ModelError(
            str(path),
            f"the disk is full{need}" if full else f"cannot be written: {error.strerror}",
            remedy="free disk space, or set DEEPAR_CACHE_DIR to a folder on another disk" if full else None,
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return digest.hexdigest()
