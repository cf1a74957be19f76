"""The options of a planner core: limits of its queue, of retries and of memory, the treatment of late tasks, and learning."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from planner.learning.table import DEFAULT_LIMIT

DEFAULT_PATIENCE_S: Final = 600.0
DEFAULT_MAX_WAITING: Final = 10_000


class WhenLate(StrEnum):
    """The treatment of a task whose every placement is predicted to end after its deadline."""

    REJECT = "reject"  # REJECTED at once, with cause `deadline`
    LEAST_LATE = "least-late"  # the policy places it as if it had no deadline; at its deadline it becomes EXPIRED


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreOptions:
    """Options that a core keeps for its whole life. They are not part of the state."""

    max_waiting: int = DEFAULT_MAX_WAITING  # limit of queued tasks (WAITING or SCHEDULED)
    max_waiting_per_device: int = 1_000  # limit of queued tasks of one device
    max_attempts: int = 100  # attempts after which a task is FAILED instead of retried
    patience_s: float = DEFAULT_PATIENCE_S  # longest time that a task may be WAITING
    remember_ended: int = 10_000  # ended tasks kept to recognise duplicate submissions
    when_late: WhenLate = WhenLate.REJECT  # the treatment of tasks that are predicted to miss their deadline
    learning: bool = False  # whether completed tasks and heartbeats correct later predictions
    fair: bool = False  # whether devices take turns on a contended edge (`planner.core.line`)
    max_estimates: int = DEFAULT_LIMIT  # limit of estimates of each sort; the least recently changed one is dropped
