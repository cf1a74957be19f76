"""Headers of control messages: CloudEvents in Kafka's binary mode, and the trace context.

They have no `ce_time`: the timestamp of the record serves that purpose.
"""

from __future__ import annotations

from bus.headers.tracing import DECISION, SUBMIT, TASK, TRACEPARENT, span_id, traceparent
from bus.messages import Decision, Message, TaskCancelled, TaskCompleted, TaskFailed, TaskSubmitted
from bus.port import Headers

_FIXED: Headers = (("content-type", b"application/json"), ("ce_specversion", b"1.0"))


class Envelope:
    """Creates the headers for the messages of one sender during one life of its process.

    `source` identifies the sender (`/deepar/0/device/d1`), `life` this run of its process. CloudEvents requires a `ce_id`
    that is unique per source: it consists of `life` and a counter. The id of a submission is its task's name, so a repeated
    submission is the same event.
    """

    def __init__(self, source: str, life: str) -> None:
        self._fixed: Headers = (*_FIXED, ("ce_source", source.encode()))
        self._life = life
        self._count = 0

    def headers(self, message: Message) -> Headers:
        """The headers of the next message."""
        self._count += 1
        known = message.task_id if isinstance(message, TaskSubmitted) else f"{self._life}-{self._count}"
        kind: str = getattr(message, "type")  # noqa: B009 - every subclass has it, the base class has not
        trace = _trace(message)
        own: Headers = (("ce_id", known.encode()), ("ce_type", f"deepar.{kind}".encode()))
        return (*self._fixed, *own, (TRACEPARENT, trace)) if trace is not None else (*self._fixed, *own)


def _trace(message: Message) -> bytes | None:
    """The trace context of a message about one task; None for other messages."""
    if isinstance(message, TaskSubmitted):
        return traceparent(message.task_id, span_id(message.task_id, SUBMIT))
    if isinstance(message, TaskCancelled):
        return traceparent(message.task_id, span_id(message.task_id, TASK))
    if isinstance(message, TaskCompleted | TaskFailed):
        return traceparent(message.task_id, span_id(message.task_id, DECISION, message.attempt))
    if isinstance(message, Decision):
        about = {getattr(change, "task_id", None) for change in message.changes} - {None}
        if len(about) == 1:
            # an admission has no attempt, and what a heartbeat teaches belongs to no task
            attempts = [getattr(change, "attempt", None) or 1 for change in message.changes]
            task_id = str(about.pop())
            return traceparent(task_id, span_id(task_id, DECISION, max(attempts)))
    return None
