"""An independent reader of a region's decision topic, which checks that the decisions are consistent.

It folds every valid record into its own core, compares state hashes, and counts the events of each task. A test may pass a
faulty `DecisionLog` to imitate a faulty reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from bus import topics
from bus.decisions import DecisionLog, Dropped
from bus.messages import Admitted, Decision, Ended, EpochOpened, Placed, Start, TaskState
from bus.port import Bus, Record
from planner.core.core import PlannerCore


class Story:
    """The valid records of the topic, in order."""

    def __init__(
        self, make_core: Callable[[], PlannerCore], log: DecisionLog | None = None, *, validate_every: int = 1
    ) -> None:
        self.core = make_core()
        self.validate_every = validate_every
        self.log = log or DecisionLog()
        self.decisions: list[Decision] = []
        self.opened: list[EpochOpened] = []
        self.dropped: list[str] = []  # reasons
        self.admitted: Counter[str] = Counter()
        self.placed: Counter[tuple[str, int]] = Counter()  # by task and attempt
        self.started: Counter[tuple[str, int]] = Counter()
        self.ends: dict[str, list[TaskState]] = {}

    def read(self, record: Record) -> None:
        """Read one record. Raises `InvariantError` or `AssertionError` if it contradicts the records before it."""
        message = self.log.read(record)
        if isinstance(message, Dropped):
            self.dropped.append(message.reason)
        elif isinstance(message, EpochOpened):
            self.opened.append(message)
        elif isinstance(message, Decision):
            before = self.decisions[-1].inputs if self.decisions else {}
            assert all(message.inputs[topic] >= offset for topic, offset in before.items()), "an input is read again"
            self.core.fold(message)
            assert self.core.state_hash == message.ledger_hash, f"decision {message.seq} replays differently"
            if message.seq % self.validate_every == 0:
                self.core.validate()
            self.decisions.append(message)
            for change in message.changes:
                match change:
                    case Admitted(task=task):
                        self.admitted[task.task_id] += 1
                    case Placed():
                        self.placed[change.task_id, change.attempt] += 1
                    case Start():
                        self.started[change.task_id, change.attempt] += 1
                    case Ended():
                        self.ends.setdefault(change.task_id, []).append(change.state)
                    case _:
                        pass

    def check(self, tasks: set[str]) -> None:
        """Every one of these tasks was admitted once and ended once, and nothing was decided twice."""
        assert self.admitted == Counter(tasks), "a task was skipped or admitted twice"
        assert set(self.ends) == tasks, f"without an end: {sorted(tasks - set(self.ends))}"
        assert all(len(ends) == 1 for ends in self.ends.values()), "a task ended twice"
        assert max(self.placed.values()) == max(self.started.values()) == 1, "something was decided twice"
        assert [d.seq for d in self.decisions] == list(range(1, len(self.decisions) + 1))
        assert self.core.live_tasks == 0


async def read_story(
    bus: Bus,
    make_core: Callable[[], PlannerCore],
    *,
    region: int = 0,
    log: DecisionLog | None = None,
    validate_every: int = 1,
) -> Story:
    """Read the topic from its first record to its current end."""
    story = Story(make_core, log, validate_every=validate_every)
    reader = await bus.reader([(topics.DECISIONS, region)], start="start")
    try:
        while await reader.lag():
            for record in await reader.fetch(timeout_s=0.5):
                story.read(record)
    finally:
        await reader.close()
    return story
