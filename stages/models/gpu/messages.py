"""Messages between a node and its GPU process: JSON objects, one a line. Tensors travel in a `SharedArea`."""

from __future__ import annotations

import json
from typing import Any, BinaryIO


def send(file: BinaryIO, words: dict[str, Any]) -> None:
    """Write one message. Raises `OSError` if the reader is gone."""
    file.write(json.dumps(words).encode() + b"\n")
    file.flush()


def receive(file: BinaryIO) -> dict[str, Any] | None:
    """Read one message; None if the writer is gone."""
    line = file.readline()
    if not line.endswith(b"\n"):
        return None
    words: dict[str, Any] = json.loads(line)
    return words
