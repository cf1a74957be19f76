"""The planner's state of one region, as its collaborators see it.

`PlannerService` provides it; `LeaderTerm` and `SnapshotWriter` receive it. They import this module instead of the service, so
imports run one way.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, Protocol

from structlog.typing import FilteringBoundLogger

from bus.decisions import DecisionLog, Dropped
from bus.envelope import Envelope
from bus.port import Bus, Record
from planner.core.core import PlannerCore
from planner.service.input_filter import InputFilter
from planner.service.task_statistics import TaskStatistics
from planner.service.traces import TaskTraces


class Failure(NamedTuple):
    """Why the planner failed to handle an input."""

    message: Any  # the decoded record; None if decoding it failed
    detail: str
    times: int  # 1: handling the input failed; 2: ending its task with that cause failed, too


class SnapshotContext(Protocol):
    """What the snapshot writer needs: the state it copies, and where and how often it writes."""

    bus: Bus
    core: PlannerCore
    name: str
    region: int
    lease_s: float
    log: FilteringBoundLogger
    envelope: Envelope
    snapshot_every: int  # decisions from one snapshot to the next
    snapshot_seq: int  # the decision of the last snapshot taken; initially that of the snapshot restored
    part_bytes: int  # approximate size of a record of a snapshot

    @property
    def master_fingerprint(self) -> str | None:
        """Fingerprint of the master secret; None if this planner does not require proofs of identity."""


class RegionContext(SnapshotContext, Protocol):
    """What a leader term needs: the inputs, the decision log and the counters as well."""

    record_bytes: int  # approximate size limit of a record of a decision; larger decisions are split
    nonce: str  # identifies the epoch that this planner opened
    decision_log: DecisionLog
    inputs: dict[str, int]  # topic -> next offset to read
    input_filter: InputFilter
    failures: dict[tuple[str, int], Failure]  # (topic, offset) -> inputs that the next term must skip
    unreadable: deque[tuple[Record, Dropped]]  # unreadable decision records, read before this planner led
    statistics: TaskStatistics
    traces: TaskTraces | None
    decisions: int  # decisions written while leading
    lost_inputs: int  # tasks and events deleted before this planner read them
    policy_errors: int  # tasks rejected because a user's policy failed
    input_failures: int  # inputs that the planner failed to handle: bugs of ours
    dead_letters: int  # dead letters written, unauthorized records included

    def now_s(self) -> float:
        """Ledger time, while leading."""

    def utc(self) -> str:
        """Wall-clock time in UTC, for people who read the records."""
