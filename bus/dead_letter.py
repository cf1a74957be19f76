"""Dead letters: rejected records, kept for the operator with their origin and cause."""

from __future__ import annotations

import structlog

from bus import topics
from bus.errors import BusError, ProtocolError
from bus.port import Bus, Record

DEAD_LETTER_VALUE_BYTES = 1_000_000
"""How many bytes of a record are kept; with the headers added they must fit the broker's limit."""

DEAD_LETTER_BURST = 100
DEAD_LETTERS_PER_S = 2.0

log = structlog.get_logger("dead-letter")


class DeadLetterLimiter:
    """Rate limiter for identity failures that are dead-lettered individually, so that a flood cannot stall the reader."""

    def __init__(self) -> None:
        self._available = float(DEAD_LETTER_BURST)
        self._since_s = 0.0

    def take(self, now_s: float) -> bool:
        """Whether the next failure is dead-lettered and logged; otherwise it is only counted."""
        self._available = min(DEAD_LETTER_BURST, self._available + (now_s - self._since_s) * DEAD_LETTERS_PER_S)
        self._since_s = now_s
        if self._available < 1.0:
            return False
        self._available -= 1.0
        return True


async def write_dead_letter(bus: Bus, record: Record, error: ProtocolError, *, task_id: str, by: str) -> None:
    """Copy a rejected record to the dead-letter topic: unchanged bytes, with origin and cause in headers."""
    origin = f"{record.topic}/{record.partition}/{record.offset}"
    headers = [
        ("deepar_origin", origin),
        ("deepar_cause", error.cause),
        ("deepar_error", str(error)[:1000]),
        ("deepar_by", by),
    ]
    if task_id:
        headers.append(("deepar_task", task_id))
    value = (record.value or b"")[:DEAD_LETTER_VALUE_BYTES]
    encoded = tuple((key, text.encode()) for key, text in headers)
    try:
        await bus.send(topics.DEAD_LETTER, value, key=origin, headers=encoded)
    except BusError as failure:
        # The record is dropped: a lost dead letter is better than a blocked partition.
        log.error("dead letter not written", origin=origin, error=str(failure))
