"""Whether what a command is asked to write can be written, found out before the work and not after it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from bus.errors import ConfigError


def writable_folder(flag: str, folder: Path) -> Path:
    """See that `folder` is there or can be made; nothing is left behind. Raises `ConfigError`, naming `flag`, if not."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "it may not be written into")
    except OSError as error:
        raise _refused(flag, folder, error.strerror) from None
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
    return folder


def writable_file(flag: str, file: Path, *, suffixes: tuple[str, ...] = ()) -> Path:
    """The same for a file, whose name must end in one of `suffixes`, if there are any."""
    if suffixes and file.suffix.lower() not in suffixes:
        raise ConfigError(f"{flag} {file}: its name must end in {' or '.join(suffixes)}")
    if file.is_dir():
        raise _refused(flag, file, "it is a folder")
    writable_folder(flag, file.parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise _refused(flag, file, "it may not be written")
    return file


def _refused(flag: str, path: Path, why: str | None) -> ConfigError:
    return ConfigError(f"{flag} {path}: cannot be written: {why}", remedy=f"name another place with {flag}")
