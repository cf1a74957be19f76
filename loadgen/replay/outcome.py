"""Task outcomes, derived from the public decisions and events.

A live replay or a simulator feeds a `Recorder`, which holds one `Outcome` per task. Times are seconds since the
start of the replay on the feeder's clock. A delay counts from the time the task was *due*, not from the time it was
sent, so lag of the generator or the bus is part of the measured delay.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import Any

from bus.messages import (
    Decision,
    Ended,
    Placed,
    Rerouted,
    Retried,
    Start,
    TaskCompleted,
    TaskState,
)
from bus.region_tasks import RegionTasks
from bus.values import Kind, Parts, Placement
from loadgen.replay.schedule import Entry

NOT_ACKNOWLEDGED = "not_acknowledged"
"""Cause of a task whose submission the bus did not acknowledge."""


@dataclass(slots=True)
class Outcome:
    """Everything recorded about one task."""

    task_id: str
    model: str
    device: str
    samples: int
    scheduled_s: float  # when it was due
    warmup: bool = False
    submitted_s: float | None = None  # when the generator handed it to the bus
    acknowledged_s: float | None = None  # when the bus acknowledged it
    placed_s: float | None = None  # when its latest placement was read
    started_s: float | None = None  # when its latest start was read
    ended_s: float | None = None  # when its end was first read
    state: TaskState | None = None  # how it ended; None while unfinished
    cause: str = ""  # reason, if it did not complete
    attempt: int = 1  # number of the latest attempt
    policy: str = ""  # policy that placed it
    placement: Placement | None = None  # the latest one
    predicted: Parts | None = None  # busy times that the planner predicted
    predicted_delay_s: float | None = None  # the paper's w, counted from the start
    predicted_wait_s: float | None = None  # from the decision to the planned start
    measured: Parts | None = None  # busy times that the stages measured
    device_delay_s: float | None = None  # from the start to the last result, as the device reported

    @property
    def where(self) -> tuple[Kind, str | None, int, int] | None:
        """Placement without rates (kind, edge, cuts); used to compare two runs of the same task."""
        place = self.placement
        return None if place is None else (place.kind, place.edge, place.cut1, place.cut2)

    @property
    def delay_s(self) -> float | None:
        """Time from due to end; None unless it completed."""
        if self.state is not TaskState.COMPLETED or self.ended_s is None:
            return None
        return self.ended_s - self.scheduled_s

    @property
    def wait_s(self) -> float | None:
        """Time from due to start; None before the start."""
        return None if self.started_s is None else max(0.0, self.started_s - self.scheduled_s)

    @property
    def kind(self) -> str:
        """Kind of its placement in the paper's terms; "none" if it was never placed."""
        return "none" if self.placement is None else self.placement.kind.value

    def place(self, placed: Placed, now_s: float) -> None:
        """Take over the latest placement."""
        self.placed_s, self.attempt, self.policy = now_s, placed.attempt, placed.policy
        self.placement, self.predicted = placed.placement, placed.parts
        self.predicted_delay_s, self.predicted_wait_s = placed.delay_s, placed.wait_s

    def reroute(self, placed: Placed) -> None:
        """Take over the placement of a running task after a change."""
        self.placement, self.predicted, self.predicted_delay_s = placed.placement, placed.parts, placed.delay_s


class Recorder:
    """Tracks the tasks of one replay. `outcomes` is in due order."""

    def __init__(self) -> None:
        self._region = RegionTasks(follow_moves=False)
        self.outcomes: dict[str, Outcome] = {}
        self.submitted = 0  # tasks handed to the bus
        self.running = 0  # tasks that have started and not ended
        self.ended = 0  # tasks that have ended, in any state
        self.delays_s: list[float] = []  # delays of completed tasks without warm-up, sorted

    def expect(self, entry: Entry) -> Outcome:
        """Register a task of the schedule before it is submitted."""
        task = entry.task
        outcome = Outcome(task.task_id, task.model, task.device, task.samples, entry.at_s, entry.warmup)
        self.outcomes[task.task_id] = outcome
        return outcome

    def submit(self, task_id: str, now_s: float, *, due_s: float | None = None) -> None:
        """Record that the task is handed to the bus now; `due_s` replaces the due time in a closed loop."""
        outcome = self.outcomes[task_id]
        outcome.submitted_s = now_s
        if due_s is not None:
            outcome.scheduled_s = due_s
        self.submitted += 1

    def decide(self, decision: Decision, now_s: float) -> list[Outcome]:
        """Apply a valid decision. Returns the tasks of this replay that it ended."""
        over = []
        for change, task in self._region.apply(decision):
            outcome = None if task is None else self.outcomes.get(task.task_id)
            if task is None or outcome is None:
                continue
            outcome.attempt = task.attempt or 1
            if isinstance(change, Placed):
                outcome.place(change, now_s)
            elif isinstance(change, Start):
                self.running += outcome.started_s is None
                outcome.started_s = now_s
            elif isinstance(change, Rerouted) and task.placed is not None:
                outcome.reroute(task.placed)
            elif isinstance(change, Retried):
                self.running -= outcome.started_s is not None
                outcome.started_s = None
            elif isinstance(change, Ended) and (outcome.state is None or outcome.cause == NOT_ACKNOWLEDGED):
                known = outcome.state is not None
                outcome.state, outcome.cause = change.state, change.cause
                outcome.measured = outcome.measured or change.measured
                if outcome.device_delay_s is None:
                    outcome.device_delay_s = change.delay_s
                if outcome.ended_s is None or change.state is not TaskState.COMPLETED:
                    outcome.ended_s = now_s
                self._end(outcome, again=known)
                over.append(outcome)
        return over

    def complete(self, event: TaskCompleted, now_s: float) -> None:
        """Apply the device's completion event. The decision that ends the task may be read before or after it."""
        outcome = self.outcomes.get(event.task_id)
        if outcome is None or outcome.measured is not None:
            return
        outcome.measured, outcome.device_delay_s = event.measured, event.delay_s
        if outcome.ended_s is None:
            outcome.ended_s = now_s

    def lose(self, task_id: str) -> None:
        """Mark the task as failed because the bus did not acknowledge it.

        If the planner received the task anyway, its decision overrides this state.
        """
        outcome = self.outcomes[task_id]
        if outcome.state is None:
            outcome.state, outcome.cause = TaskState.FAILED, NOT_ACKNOWLEDGED
            self._end(outcome)

    def _end(self, outcome: Outcome, *, again: bool = False) -> None:
        self.running -= outcome.started_s is not None
        self.ended += not again
        delay_s = outcome.delay_s
        if delay_s is not None and not outcome.warmup:
            insort(self.delays_s, delay_s)


def as_row(outcome: Outcome) -> dict[str, Any]:
    """An outcome as the JSON object of `profile_export.jsonl`: seconds from the start, rates in bit/s."""
    return {
        "task_id": outcome.task_id,
        "model": outcome.model,
        "device": outcome.device,
        "samples": outcome.samples,
        "warmup": outcome.warmup,
        "state": None if outcome.state is None else outcome.state.value,
        "cause": outcome.cause,
        "attempt": outcome.attempt,
        "policy": outcome.policy,
        "scheduled_s": outcome.scheduled_s,
        "submitted_s": outcome.submitted_s,
        "acknowledged_s": outcome.acknowledged_s,
        "placed_s": outcome.placed_s,
        "started_s": outcome.started_s,
        "ended_s": outcome.ended_s,
        "wait_s": outcome.wait_s,
        "delay_s": outcome.delay_s,
        "device_delay_s": outcome.device_delay_s,
        "predicted_wait_s": outcome.predicted_wait_s,
        "predicted_delay_s": outcome.predicted_delay_s,
        "placement": None if outcome.placement is None else outcome.placement.model_dump(mode="json"),
        "predicted": None if outcome.predicted is None else outcome.predicted.model_dump(mode="json"),
        "measured": None if outcome.measured is None else outcome.measured.model_dump(mode="json"),
    }
