"""What came of each task, learned from the records that everybody can read: decisions and events.

A `Recorder` is fed by whoever watches (a live replay, the simulators) and holds one `Outcome` a task. Times
are seconds on the watcher's clock from the start of the replay; a delay counts from the instant the task was
*due*, not from when it was sent, so that a generator or a bus that falls behind shows in the numbers instead
of hiding in them.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import Any

from bus.messages import (
    Decision,
    Ended,
    Placed,
    Retried,
    Start,
    TaskCompleted,
    TaskState,
)
from bus.values import Kind, Parts, Placement
from loadgen.replay.schedule import Entry

NOT_ACKNOWLEDGED = "not_acknowledged"
"""The cause of a task that the bus did not take, as far as the generator could see."""


@dataclass(slots=True)
class Outcome:
    """One task's story."""

    task_id: str
    model: str
    device: str
    samples: int
    scheduled_s: float  # when it was due
    warmup: bool = False
    submitted_s: float | None = None  # when it was handed to the bus
    acknowledged_s: float | None = None  # when the bus had it
    placed_s: float | None = None  # when its (last) placement was read
    started_s: float | None = None  # when its (last) start was read
    ended_s: float | None = None  # when its end was seen first
    state: TaskState | None = None  # how it ended; None: it has not
    cause: str = ""  # why, where it did not complete
    attempt: int = 1  # the last one
    policy: str = ""  # who placed it
    placement: Placement | None = None  # the last one
    predicted: Parts | None = None  # busy times the planner expected
    predicted_delay_s: float | None = None  # w, from the start
    predicted_wait_s: float | None = None  # from the decision to the start it promised
    measured: Parts | None = None  # busy times that were measured
    device_delay_s: float | None = None  # from the start to the last result, as the device reported

    @property
    def where(self) -> tuple[Kind, str | None, int, int] | None:
        """Its placement without the rates: what two runs of the same task are compared by."""
        place = self.placement
        return None if place is None else (place.kind, place.edge, place.cut1, place.cut2)

    @property
    def delay_s(self) -> float | None:
        """From the instant it was due to its end; None unless it completed."""
        if self.state is not TaskState.COMPLETED or self.ended_s is None:
            return None
        return self.ended_s - self.scheduled_s

    @property
    def wait_s(self) -> float | None:
        """From the instant it was due to its start."""
        return None if self.started_s is None else max(0.0, self.started_s - self.scheduled_s)

    @property
    def kind(self) -> str:
        """Of its placement, by the paper's names; "none" where it was never placed."""
        return "none" if self.placement is None else self.placement.kind.value


class Recorder:
    """Follows the tasks of one replay. `outcomes` is in the order in which the tasks were due."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.submitted = 0  # tasks handed to the bus
        self.running = 0  # tasks between start and end
        self.ended = 0  # tasks that are over, whatever the state
        self.delays_s: list[float] = []  # of completed tasks without warm-up, sorted

    def expect(self, entry: Entry) -> Outcome:
        """A task of the schedule, before it is submitted."""
        task = entry.task
        outcome = Outcome(task.task_id, task.model, task.device, task.samples, entry.at_s, entry.warmup)
        self.outcomes[task.task_id] = outcome
        return outcome

    def submit(self, task_id: str, now_s: float, *, due_s: float | None = None) -> None:
        """The task goes to the bus now; `due_s` corrects the due time of a closed loop."""
        outcome = self.outcomes[task_id]
        outcome.submitted_s = now_s
        if due_s is not None:
            outcome.scheduled_s = due_s
        self.submitted += 1

    def decide(self, decision: Decision, now_s: float) -> list[Outcome]:
        """A valid decision was read. Returns the tasks of ours that it ended."""
        over = []
        for change in decision.changes:
            task_id = getattr(change, "task_id", None)
            outcome = self.outcomes.get(task_id) if task_id is not None else None
            if outcome is None:
                continue
            if isinstance(change, Placed):
                outcome.placed_s, outcome.attempt, outcome.policy = now_s, change.attempt, change.policy
                outcome.placement, outcome.predicted = change.placement, change.parts
                outcome.predicted_delay_s, outcome.predicted_wait_s = change.delay_s, change.wait_s
            elif isinstance(change, Start):
                if outcome.started_s is None:
                    self.running += 1
                outcome.started_s, outcome.attempt = now_s, change.attempt
            elif isinstance(change, Retried):
                self.running -= outcome.started_s is not None
                outcome.started_s, outcome.attempt = None, change.attempt
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
        """The device says that the last result is there. The decision that ends the task may be read before
        or after.
        """
        outcome = self.outcomes.get(event.task_id)
        if outcome is None or outcome.measured is not None:
            return
        outcome.measured, outcome.device_delay_s = event.measured, event.delay_s
        if outcome.ended_s is None:
            outcome.ended_s = now_s

    def lose(self, task_id: str) -> None:
        """The bus did not acknowledge the task. Should the planner have it all the same, its decision will
        correct this.
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
