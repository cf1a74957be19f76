"""The context of one region, shared by the planner service, its leader terms and its snapshot writer.

The service creates one context and replaces `core`, `decision_log` and `inputs` when it replays the decision topic.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import structlog
from structlog.typing import FilteringBoundLogger

from bus.decisions import DecisionLog, Dropped
from bus.headers.envelope import Envelope
from bus.port import Bus, Record
from planner.core.core import PlannerCore
from planner.service.input_filter import InputFilter
from planner.service.record_split import RECORD_BYTES
from planner.service.task_statistics import TaskStatistics
from planner.service.traces import TaskTraces

LEASE_S: Final = 5.0
"""Default silence of a leader after which another planner takes over."""
SNAPSHOT_EVERY: Final = 500
"""Default number of decisions from one snapshot to the next."""
PART_BYTES: Final = 250_000
"""Default size of a part of a snapshot: about two hundred tasks, serialized in about two milliseconds."""
MAX_UNREADABLE: Final = 100
"""Limit for unreadable decision records that are remembered until this planner leads and dead-letters them."""


class Failure(NamedTuple):
    """Why the planner failed to handle an input."""

    message: Any  # the decoded record; None if decoding it failed
    detail: str
    times: int  # 1: handling the input failed; 2: ending its task with that cause failed, too


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSettings:
    """Settings of one planner service."""

    name: str = "planner"
    region: int = 0
    lease_s: float = LEASE_S  # silence of this planner, as leader, after which another one takes over
    take_over: bool = False  # claim the region once, although its leader is alive
    snapshot_every: int = SNAPSHOT_EVERY  # decisions from one snapshot to the next
    part_bytes: int = PART_BYTES  # approximate size of a record of a snapshot
    record_bytes: int = RECORD_BYTES  # approximate size limit of a record of a decision; larger decisions are split
    trust_everybody: bool = False  # turn off proofs of identity in a region that requires them


@dataclass(slots=True)
class PlannerCounters:
    """Counters of one planner since its process started."""

    decisions: int = 0  # decisions written while leading
    lost_inputs: int = 0  # tasks and events deleted before this planner read them
    policy_errors: int = 0  # tasks rejected because a user's policy failed
    learned: int = 0  # changes of what was learned that this planner recorded
    input_failures: int = 0  # inputs that the planner failed to handle: bugs of ours
    dead_letters: int = 0  # dead letters written, unauthorized records included


class LedgerClock:
    """Ledger time while leading: the time of the last decision plus the local time since this planner took over."""

    def __init__(self) -> None:
        self.last_s = 0.0  # ledger time of the last decision read
        self._since_s = 0.0  # start of the term, on the event loop's clock

    def start(self) -> None:
        """Let ledger time run from now on: a term begins."""
        self._since_s = asyncio.get_running_loop().time()

    def now_s(self) -> float:
        """Ledger time."""
        return self.last_s + (asyncio.get_running_loop().time() - self._since_s)


@dataclass(slots=True)
class RegionContext:
    """What one planner knows about its region, and what it needs to serve it."""

    bus: Bus
    settings: PlannerSettings
    core: PlannerCore
    input_filter: InputFilter
    wall_clock: Callable[[], float] = time.time  # seconds since 1970; only labels records for people who read them
    counters: PlannerCounters = field(default_factory=PlannerCounters)
    statistics: TaskStatistics = field(default_factory=TaskStatistics)
    traces: TaskTraces | None = None
    clock: LedgerClock = field(default_factory=LedgerClock)
    decision_log: DecisionLog = field(
        default_factory=DecisionLog
    )  # which decision records count, up to the last one read
    inputs: dict[str, int] = field(default_factory=dict)  # topic -> next offset to read
    nonce: str = ""  # identifies the epoch that this planner opened
    snapshot_seq: int = 0  # the decision of the last snapshot taken; initially that of the snapshot restored
    failures: dict[tuple[str, int], Failure] = field(
        default_factory=dict
    )  # (topic, offset) -> inputs to skip next term
    # unreadable decision records, read before this planner led
    unreadable: deque[tuple[Record, Dropped]] = field(default_factory=lambda: deque(maxlen=MAX_UNREADABLE))
    envelope: Envelope = field(init=False)
    log: FilteringBoundLogger = field(init=False)

    def __post_init__(self) -> None:
        name, region = self.settings.name, self.settings.region
        self.envelope = Envelope(f"/deepar/{region}/planner/{name}", uuid.uuid4().hex[:12])
        self.log = structlog.get_logger("planner").bind(planner=name, region=region)

    @property
    def master_fingerprint(self) -> str | None:
        """Fingerprint of the master secret; None if this planner does not require proofs of identity."""
        return None if self.input_filter.master is None else self.input_filter.master.fingerprint

    def now_s(self) -> float:
        """Ledger time, while leading."""
        return self.clock.now_s()

    def utc(self) -> str:
        """Wall-clock time in UTC, for people who read the records."""
        return datetime.fromtimestamp(self.wall_clock(), UTC).isoformat(timespec="milliseconds")
