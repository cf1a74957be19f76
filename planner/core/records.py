"""What the planner remembers of tasks and nodes, and how each counts in the hash of its state."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from itertools import islice
from typing import Any, Final

from bus.messages import NodeAnnounced, Placed, TaskState, TaskSubmitted
from planner.core.transitions import Happened
from planner.search.algorithm1 import Reached
from planner.search.cost import PlatformRow, RowTable
from planner.search.ledger import Reservation

HISTORY: Final = 12
"""At least so many steps of a task are kept (at most twice as many), for the message of an `InvariantError`; they are not
part of the state.
"""

NEVER: Final = float("inf")


class Task:
    """A task that has not ended."""

    __slots__ = (
        "attempt",
        "avoided",
        "deadline_s",
        "digest",
        "history",
        "placed",
        "seq",
        "state",
        "submitted",
        "task_id",
        "waiting_since_s",
    )

    def __init__(self, submitted: TaskSubmitted, seq: int, now: float) -> None:
        self.submitted = submitted
        self.task_id = submitted.task_id
        self.seq = seq  # order of admission
        self.state = TaskState.WAITING
        self.attempt = 1
        self.deadline_s = NEVER if submitted.deadline_s is None else now + submitted.deadline_s  # ledger time
        self.waiting_since_s = now  # when it last became WAITING
        self.placed: Placed | None = None  # of the present attempt
        self.avoided: tuple[str, ...] = ()  # nodes at which attempts failed, since it was last placed at one of them
        self.digest = 0  # its share of the state's hash
        self.history: list[Happened] = []

    def text(self, r: Reservation | None) -> str:
        """Everything about it that decides what will happen, for the hash."""
        held = ""
        if r is not None:
            device = r.sender if r.computes else None
            held = f"{r.edge}|{device}|{r.start_s!r}|{r.end_s!r}|{r.slots}|{r.link1_bps}|{r.link2_bps}|{r.running}"
            held += f"|moved {r.moves}" if r.moves else ""
        return (
            f"task|{self.task_id}|{self.seq}|{self.state}|{self.attempt}|{self.deadline_s!r}|"
            f"{self.waiting_since_s!r}|{held}"
            # left out of most tasks, so that records from before it was known have the same hash
            f"{'|avoids ' + ','.join(self.avoided) if self.avoided else ''}"
        )

    def __repr__(self) -> str:
        return f"<Task {self.task_id} {self.state} attempt {self.attempt}>"


class Node:
    """A node that is part of the region."""

    __slots__ = ("_texts", "announced", "digest", "draining", "reach", "rows")

    def __init__(self, announced: NodeAnnounced, table: RowTable) -> None:
        self.announced = announced
        self.rows: dict[str, PlatformRow] = {profile.model: table.row(profile) for profile in announced.models}
        self.draining = announced.draining is True
        # What most nodes never say is left out, so that records from before it could be said have the same hash.
        left_out = None if self.draining else {"draining"}
        self.digest = hash_of("node|" + announced.model_dump_json(exclude=left_out))
        self.reach: dict[str, Reached] = {}  # of a device, by model; derived, not part of the state
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
    """The last tasks that ended, so that a duplicate of their submission is recognised: bounded, oldest out first.

    They are hashed when the state's hash is asked for; what came and went in between is never hashed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._ended: OrderedDict[str, TaskState] = OrderedDict()
        self._fresh = 0  # the last of them that are not in any hash yet
        self._gone: list[tuple[str, TaskState]] = []  # those that are in a hash and no longer remembered
        self._contents: dict[str, int] = {}  # what was submitted; of those that ended since this process began

    def add(self, task_id: str, state: TaskState, submitted: TaskSubmitted) -> None:
        """Remember one."""
        ended = self._ended
        ended[task_id] = state
        self._contents[task_id] = content_of(submitted)
        self._fresh += 1
        if len(ended) > self.limit:
            oldest = ended.popitem(last=False)
            self._contents.pop(oldest[0], None)
            if self._fresh > len(ended):
                self._fresh -= 1
            else:
                self._gone.append(oldest)

    def hash_change(self) -> int:
        """What the sum of all hashes has changed by since this was asked for last."""
        change = sum(_ended_hash(*one) for one in islice(reversed(self._ended.items()), self._fresh))
        change -= sum(_ended_hash(*one) for one in self._gone)
        self._fresh = 0
        self._gone.clear()
        return change

    def get(self, task_id: str) -> TaskState | None:
        """How a task ended, if it is remembered."""
        return self._ended.get(task_id)

    def content(self, task_id: str) -> int | None:
        """`content_of` its submission, where that is known."""
        return self._contents.get(task_id)

    def __len__(self) -> int:
        return len(self._ended)

    def to_state(self) -> list[list[str]]:
        """Oldest first."""
        return [[task_id, state.value] for task_id, state in self._ended.items()]

    def restore(self, state: list[list[Any]]) -> int:
        """From `to_state`. The sum of all hashes."""
        self._ended = OrderedDict((task_id, TaskState(value)) for task_id, value in state)
        self._fresh = 0
        self._gone.clear()
        self._contents.clear()
        return self.digest()

    def digest(self) -> int:
        """The sum of all hashes, computed anew."""
        return sum(_ended_hash(task_id, state) for task_id, state in self._ended.items())


def _ended_hash(task_id: str, state: TaskState) -> int:
    return hash_of(f"ended|{task_id}|{state}")


def content_of(submitted: TaskSubmitted) -> int:
    """Everything that a task asks for, as a number: the same for a submission that is only sent again."""
    return hash_of(submitted.model_dump_json(exclude={"submitted_at"}))


def hash_of(text: str) -> int:
    """128 bits of a text. The state's hash is the sum over everything that is in it, so it can be kept up to date."""
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


HASH_MASK: Final = (1 << 128) - 1
