"""The state machine of a task: `TaskState` (in `bus.messages`), `Step`, and one table of transitions.

The state `None` stands for a task that the planner does not know yet. A transition that is missing from the table is a bug:
`next_state` raises an error that names the task, its state, the step, and its recent history.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final

from bus.errors import InvariantError
from bus.messages import TaskState


class Step(StrEnum):
    """A step in the life of a task; the values are the names of the changes in a decision."""

    ADMITTED = "admitted"
    PLACED = "placement"
    MOVED = "moved"
    START = "start"
    OVERRAN = "overran"
    REROUTED = "rerouted"
    RETRIED = "retried"
    COMPLETED = "COMPLETED"
    REJECTED = "REJECTED"
    FAILED = "FAILED"
    EXPIRED = "EXPIRED"


_WAITING, _SCHEDULED, _RUNNING = TaskState.WAITING, TaskState.SCHEDULED, TaskState.RUNNING

TRANSITIONS: Final[dict[tuple[TaskState | None, Step], TaskState]] = {
    (None, Step.ADMITTED): _WAITING,
    (_WAITING, Step.PLACED): _SCHEDULED,
    (_SCHEDULED, Step.MOVED): _SCHEDULED,
    (_SCHEDULED, Step.START): _RUNNING,
    (_RUNNING, Step.OVERRAN): _RUNNING,
    (_RUNNING, Step.REROUTED): _RUNNING,
    (_WAITING, Step.RETRIED): _WAITING,
    (_SCHEDULED, Step.RETRIED): _WAITING,
    (_RUNNING, Step.RETRIED): _WAITING,
    # The device has every result, so the task is complete in any state, e.g. after a node was declared lost too early.
    (_WAITING, Step.COMPLETED): TaskState.COMPLETED,
    (_SCHEDULED, Step.COMPLETED): TaskState.COMPLETED,
    (_RUNNING, Step.COMPLETED): TaskState.COMPLETED,
    (_WAITING, Step.REJECTED): TaskState.REJECTED,
    (_WAITING, Step.FAILED): TaskState.FAILED,
    (_SCHEDULED, Step.FAILED): TaskState.FAILED,
    (_RUNNING, Step.FAILED): TaskState.FAILED,
    (_WAITING, Step.EXPIRED): TaskState.EXPIRED,
    (_SCHEDULED, Step.EXPIRED): TaskState.EXPIRED,
    (_RUNNING, Step.EXPIRED): TaskState.EXPIRED,
}


ENDING: Final[dict[TaskState, Step]] = {state: Step(state.value) for state in TaskState if state.ended}
"""The step that leads to each end state."""

Happened = tuple[TaskState | None, Step, float]
"""State before the step, the step, and ledger time; `in_words` formats it only when an error needs it."""


def next_state(task_id: str, state: TaskState | None, step: Step, history: Sequence[Happened] = ()) -> TaskState:
    """The state after a step. Raises `InvariantError` for a transition that is not in the table."""
    to = TRANSITIONS.get((state, step))
    if to is None:
        past = "; ".join(in_words(history)) or "no known history"
        raise InvariantError(f"task {task_id}: no transition from {state or 'unknown'} by {step}; before that: {past}")
    return to


def in_words(history: Iterable[Happened]) -> list[str]:
    """A task's history for people: `WAITING -> SCHEDULED by placement at 1.500000`."""
    return [
        f"{state or 'unknown'} -> {TRANSITIONS[state, step]} by {step} at {at_s:.6f}" for state, step, at_s in history
    ]
