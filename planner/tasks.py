"""What the planner remembers of tasks and nodes, and how each counts in the hash of its state."""

from __future__ import annotations

from collections import OrderedDict, deque
from hashlib import blake2b
from typing import Any, Final

from bus.messages import NodeAnnounced, Placed, TaskState, TaskSubmitted
from planner.algorithm import EdgeOption
from planner.cost import PlatformRow, RowTable
from planner.ledger import Reservation
from planner.search import CutSearch

HISTORY: Final = 12
"""So many steps of a task are kept, for the message of an `InvariantError`; they are not part of the state."""

NEVER: Final = float("inf")


class Task:
    """A task that has not ended."""

    __slots__ = ("attempt", "deadline_s", "digest", "history", "placed", "seq", "state", "submitted", "waiting_since_s")

    def __init__(self, submitted: TaskSubmitted, seq: int, now: float) -> None:
        self.submitted = submitted
        self.seq = seq  # order of admission
        self.state = TaskState.WAITING
        self.attempt = 1
        self.deadline_s = NEVER if submitted.deadline_s is None else now + submitted.deadline_s  # ledger time
        self.waiting_since_s = now  # when it last became WAITING
        self.placed: Placed | None = None  # of the present attempt
        self.digest = 0  # its share of the state's hash
        self.history: deque[str] = deque(maxlen=HISTORY)

    @property
    def task_id(self) -> str:
        """Its name."""
        return self.submitted.task_id

    def text(self, r: Reservation | None) -> str:
        """Everything about it that decides what will happen, for the hash."""
        held = ""
        if r is not None:
            held = f"{r.edge}|{r.device}|{r.start_s!r}|{r.end_s!r}|{r.slots}|{r.link1_bps}|{r.link2_bps}|{r.running}"
        return (
            f"task|{self.submitted.task_id}|{self.seq}|{self.state}|{self.attempt}|{self.deadline_s!r}|"
            f"{self.waiting_since_s!r}|{held}"
        )

    def __repr__(self) -> str:
        return f"<Task {self.task_id} {self.state} attempt {self.attempt}>"


class Node:
    """A node that is part of the region."""

    __slots__ = ("_texts", "alone", "announced", "digest", "reach", "rows")

    def __init__(self, announced: NodeAnnounced, table: RowTable) -> None:
        self.announced = announced
        self.rows: dict[str, PlatformRow] = {profile.model: table.row(profile) for profile in announced.models}
        self.digest = hash_of("node|" + announced.model_dump_json())
        self.reach: dict[str, list[EdgeOption]] = {}  # of a device, by model; derived, not part of the state
        self.alone: dict[str, CutSearch] = {}
        self._texts: list[tuple[str, str]] | None = None

    def profile_texts(self) -> list[tuple[str, str]]:
        """Each profile as JSON without its platform, and the platform; made once."""
        if self._texts is None:
            self._texts = [
                (profile.model_dump_json(exclude={"platform"}), profile.platform) for profile in self.announced.models
            ]
        return self._texts

    def __repr__(self) -> str:
        return f"<Node {self.announced.role} {self.announced.node} {self.announced.incarnation}>"


class EndedTasks:
    """The last tasks that ended, so that a duplicate of their submission is recognised: bounded, oldest out first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._ended: OrderedDict[str, TaskState] = OrderedDict()

    def add(self, task_id: str, state: TaskState) -> int:
        """Remember one. What the hash of the whole changes by."""
        change = hash_of(f"ended|{task_id}|{state}")
        self._ended[task_id] = state
        if len(self._ended) > self.limit:
            gone, old = self._ended.popitem(last=False)
            change -= hash_of(f"ended|{gone}|{old}")
        return change

    def get(self, task_id: str) -> TaskState | None:
        """How a task ended, if it is remembered."""
        return self._ended.get(task_id)

    def __len__(self) -> int:
        return len(self._ended)

    def to_state(self) -> list[list[str]]:
        """Oldest first."""
        return [[task_id, state.value] for task_id, state in self._ended.items()]

    def restore(self, state: list[list[Any]]) -> int:
        """From `to_state`. The sum of all hashes."""
        self._ended = OrderedDict((task_id, TaskState(value)) for task_id, value in state)
        return self.digest()

    def digest(self) -> int:
        """The sum of all hashes, computed anew."""
        return sum(hash_of(f"ended|{task_id}|{state}") for task_id, state in self._ended.items())


def hash_of(text: str) -> int:
    """128 bits of a text. The state's hash is the sum over everything that is in it, so it can be kept up to date."""
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


HASH_MASK: Final = (1 << 128) - 1
