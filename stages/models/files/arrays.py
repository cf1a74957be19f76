"""Reading of numpy's `.npz` files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from bus.errors import ConfigError

UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    MemoryError,  # a header that claims more than there is memory for
    SyntaxError,
    RuntimeError,  # an encrypted archive, or a compression that Python lacks
    TokenError,
    BadZipFile,
    struct.error,
    zlib.error,
)
"""What numpy raises for a `.npy` or `.npz` file that is broken."""


@contextmanager
def stored_arrays(path: Path) -> Iterator[Any]:
    """The arrays of an .npz file, by name; read when they are asked for. Never unpickles."""
    try:
        stored: Any = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ConfigError(f"{path} holds one array, not arrays by name; save it with numpy.savez")
        with stored:
            yield stored
    except UNREADABLE as error:
        raise ConfigError(f"{path} cannot be read as an .npz file: {error}") from error
