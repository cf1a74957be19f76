"""The changes of the event that is being handled: each is applied to the region and listed.

Handlers of all kinds change the region through this object, so it also holds what they share: ending and retrying a task.
"""

from __future__ import annotations

from bus.messages import Change, Ended, Retried, TaskCompleted, TaskState
from bus.text.units import format_count
from bus.unchecked_constructors import maker
from planner.core.region.records import Task
from planner.core.region.state import RegionState

# Changes are built without validation: their values come from validated messages or are computed here from them.
_retried, _ended = maker(Retried), maker(Ended)


class ChangeRecorder:
    """Applies and lists changes, and collects the tasks that must be placed before handling the event ends."""

    def __init__(self, region: RegionState, max_attempts: int) -> None:
        self.changes: list[Change] = []  # changes of the event that is being handled
        self.replans: list[tuple[float, int, str]] = []  # rank, order of admission, and id, of tasks to place again
        self._region = region
        self._apply = region.apply
        self._max_attempts = max_attempts

    def begin(self) -> list[Change]:
        """Start the list of changes of the next event, and return it; `do` fills it."""
        changes: list[Change] = []
        self.changes = changes
        return changes

    def do(self, change: Change, now: float) -> None:
        """Apply a change and list it."""
        self._apply(change, now)
        self.changes.append(change)

    def announce(self, change: Change) -> None:
        """List a change that only announces what an earlier change has applied."""
        self.changes.append(change)

    def replan_later(self, task: Task) -> None:
        """Place the task again before handling the event ends."""
        self.replans.append((task.rank(None).admitted_s, task.seq, task.task_id))

    def take_replans(self) -> list[tuple[float, int, str]]:
        """The tasks to place again, in order of admission less their head starts; the list is empty afterwards."""
        found, self.replans = sorted(self.replans), []
        return found

    def may_retry(self, task: Task, cause: str, now: float) -> bool:
        """Whether a task may have another attempt."""
        return task.attempt - task.uncounted < self._max_attempts or not task.counts(cause, now)

    def retry(self, task: Task, cause: str, now: float, detail: str = "", failed_at: str | None = None) -> None:
        """Start the next attempt of a task, or fail it if it had all its attempts."""
        if not self.may_retry(task, cause, now):
            detail = f"after {format_count(task.attempt, 'attempt')}; {detail}"
            self.end(task, TaskState.FAILED, now, cause=cause, detail=detail)
            return
        attempt = task.attempt + 1
        self.do(_retried(task_id=task.task_id, attempt=attempt, cause=cause, detail=detail, failed_at=failed_at), now)
        self.replan_later(task)

    def end(
        self,
        task: Task,
        state: TaskState,
        now: float,
        *,
        cause: str = "",
        detail: str = "",
        completed: TaskCompleted | None = None,
    ) -> None:
        """End a task, and release its reservation."""
        r = self._region.ledger.reservations.get(task.task_id)
        self.do(
            _ended(
                task_id=task.task_id,
                attempt=task.attempt,
                state=state,
                cause=cause,
                detail=detail,
                edge=None if r is None else r.edge,
                released_slots=0 if r is None else r.slots,
                released_link1_bps=0 if r is None else r.link1_bps,
                released_link2_bps=0 if r is None else r.link2_bps,
                measured=None if completed is None else completed.measured,
                delay_s=None if completed is None else completed.delay_s,
            ),
            now,
        )
