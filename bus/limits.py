"""Record size limit, computed as Kafka computes it."""

from __future__ import annotations

from bus.port import Headers

MAX_RECORD_BYTES = 1_048_588
"""Kafka's default for `message.max.bytes`: the size of a record batch, including its header of 61 bytes."""

_BATCH_HEADER_BYTES = 61  # of a record batch, format 2
_RECORD_OVERHEAD_BYTES = (
    5 + 1 + 10 + 5 + 5 + 5 + 5
)  # maximum of length, attributes, timestamp, offset, key, value, header count
_HEADER_OVERHEAD_BYTES = 5 + 5  # two lengths


def record_bytes(value_bytes: int, key_bytes: int, headers: Headers) -> int:
    """Upper bound for the size of a batch with one record, with the longest encoding of every varint.

    It exceeds the true size by some dozen bytes at most and is never below it, so the broker accepts every record that
    passes.
    """
    size = _BATCH_HEADER_BYTES + _RECORD_OVERHEAD_BYTES + value_bytes + key_bytes
    for name, content in headers:
        size += _HEADER_OVERHEAD_BYTES + len(name) + len(content)
    return size
