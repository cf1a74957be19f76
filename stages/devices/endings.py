"""Errors of samples that get no answer: why, and whether the application may send them again."""

from __future__ import annotations

from bus.errors import DeeparError
from bus.messages import Ended, TaskState

REPEATABLE = frozenset(
    ("cancelled", "input_lost", "planner_error", "stalled")
    + ("device_lost", "no_device", "no_node")
    + ("device_queue_full", "queue_full")
    + ("no_plan", "undecided", "undecodable")
)
"""Causes of ends after which the same samples may be sent again: a node or a record was lost, or the
region was short of something; the input is fine."""


class UnansweredError(DeeparError):
    """A sample gets no answer. `cause` is a short, stable word; `repeatable` says whether sending it again may help."""

    def __init__(self, cause: str, detail: str = "", *, repeatable: bool) -> None:
        super().__init__(detail or cause)
        self.cause, self.detail, self.repeatable = cause, detail, repeatable


class TaskEndedError(UnansweredError):
    """The task of a request ended without all results."""


class SessionEndedError(UnansweredError):
    """The session ended before the answer, or takes no more frames."""


class SampleFailedError(UnansweredError):
    """The model failed on this sample."""


class FrameDroppedError(UnansweredError):
    """A newer frame replaced this one before it was sent, or the session's queue was full."""


def end_of(ended: Ended) -> tuple[str, str, bool]:
    """Cause, detail and whether the samples may be sent again, of a task that ended without all answers."""
    cause = ended.cause or ended.state.value.lower()
    return (
        cause,
        ended.detail or f"the task ended: {cause}",
        ended.cause in REPEATABLE or ended.state is TaskState.COMPLETED,
    )
