"""The headers of control messages: CloudEvents in Kafka's binary mode, and the trace that a message belongs to.

`ce_time` is left out: the record's own timestamp says it, and no clock is read for the sake of a header.
"""

from __future__ import annotations

from bus.messages import Decision, Message, TaskCancelled, TaskCompleted, TaskFailed, TaskSubmitted
from bus.port import Headers
from bus.tracing import DECISION, SUBMIT, TASK, TRACEPARENT, span_id, traceparent

_FIXED: Headers = (("content-type", b"application/json"), ("ce_specversion", b"1.0"))


class Envelope:
    """Makes the headers of what one sender writes during one life of its process.

    `source` says who it is (`/deepar/0/device/d1`), `life` tells this life from others: together with a count they make
    `ce_id`, which CloudEvents want to be unique a source. A submission's id is its task's name: submitted again, it is the
    same event.
    """

    def __init__(self, source: str, life: str) -> None:
        self._fixed: Headers = (*_FIXED, ("ce_source", source.encode()))
        self._life = life
        self._count = 0

    def headers(self, message: Message) -> Headers:
        """The headers of the next message."""
        self._count += 1
        known = message.task_id if isinstance(message, TaskSubmitted) else f"{self._life}-{self._count}"
        kind: str = getattr(message, "type")  # noqa: B009 - every message has one, the class that they share has not
        trace = _trace(message)
        own: Headers = (("ce_id", known.encode()), ("ce_type", f"deepar.{kind}".encode()))
        return (*self._fixed, *own, (TRACEPARENT, trace)) if trace is not None else (*self._fixed, *own)


def _trace(message: Message) -> bytes | None:
    """The trace of a message about one task."""
    if isinstance(message, TaskSubmitted):
        return traceparent(message.task_id, span_id(message.task_id, SUBMIT))
    if isinstance(message, TaskCancelled):
        return traceparent(message.task_id, span_id(message.task_id, TASK))
    if isinstance(message, TaskCompleted | TaskFailed):
        return traceparent(message.task_id, span_id(message.task_id, DECISION, message.attempt))
    if isinstance(message, Decision):
        about = {getattr(change, "task_id", None) for change in message.changes} - {None}
        if len(about) == 1:
            attempts = [getattr(change, "attempt", 1) for change in message.changes]
            task_id = str(about.pop())
            return traceparent(task_id, span_id(task_id, DECISION, max(attempts)))
    return None
