"""How large a record may be, counted as Kafka counts."""

from __future__ import annotations

from bus.port import Headers

MAX_RECORD_BYTES = 1_048_588
"""Kafka's own default for `message.max.bytes`: a batch of records, its 61 bytes of header included."""

_BATCH_HEADER_BYTES = 61  # of a record batch, format 2
_RECORD_OVERHEAD_BYTES = (
    5 + 1 + 10 + 5 + 5 + 5 + 5
)  # length, attributes, times, offset, key, value, header count: at most
_HEADER_OVERHEAD_BYTES = 5 + 5  # two lengths


def record_bytes(value_bytes: int, key_bytes: int, headers: Headers) -> int:
    """The most that a record alone in its batch can take on a broker (the lengths are varints; all are taken as widest).

    Exact to some dozen bytes; it never says less than the truth, so what passes here passes at the broker.
    """
    size = _BATCH_HEADER_BYTES + _RECORD_OVERHEAD_BYTES + value_bytes + key_bytes
    for name, content in headers:
        size += _HEADER_OVERHEAD_BYTES + len(name) + len(content)
    return size
