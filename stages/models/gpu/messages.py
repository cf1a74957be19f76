"""Messages between a node and its GPU process: a JSON object and bytes, each preceded by its length."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

_LENGTHS = struct.Struct("<IQ")


def send(file: BinaryIO, words: dict[str, Any], payload: Sequence[memoryview] = ()) -> None:
    """Write one message. Raises `OSError` if the reader is gone."""
    head = json.dumps(words).encode()
    file.write(_LENGTHS.pack(len(head), sum(part.nbytes for part in payload)) + head)
    for part in payload:
        file.write(part)
    file.flush()


def receive(file: BinaryIO) -> tuple[dict[str, Any], memoryview] | None:
    """Read one message; None if the writer is gone."""
    lengths = file.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    head_bytes, payload_bytes = _LENGTHS.unpack(lengths)
    head = file.read(head_bytes)
    payload = bytearray(payload_bytes)
    if len(head) < head_bytes or file.readinto(payload) < payload_bytes:  # type: ignore[attr-defined]
        return None
    words: dict[str, Any] = json.loads(head)
    return words, memoryview(payload)
