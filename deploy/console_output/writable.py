"""Early checks that the output paths of a command are writable, before its work begins."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from bus.errors import ConfigError


def writable_folder(flag: str, folder: Path) -> Path:
    """Check that `folder` exists or can be created, without creating it. Raises `ConfigError`, naming `flag`, if not."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "no permission to write into it")
    except OSError as error:
        raise _refused(flag, folder, error.strerror) from None
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
    return folder


def writable_file(flag: str, file: Path, *, suffixes: tuple[str, ...] = ()) -> Path:
    """Check that a file is writable and, if `suffixes` are given, ends in one of them."""
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
