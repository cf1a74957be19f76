"""The planner's records of live tasks, nodes and ended tasks, with the text of each that enters the state hash."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from itertools import islice
from typing import Any, Final

from bus.messages import NodeAnnounced, Placed, TaskState, TaskSubmitted
from bus.values import ModelProfile
from planner.core.region.transitions import Happened
from planner.search.cost import PlatformRow, RowTable
from planner.search.ledger.reservation import Rank, Reservation
from planner.search.request import Reached

HISTORY: Final = 12
"""Steps of a task that are kept for the message of an `InvariantError`: at least this many, at most twice as many.

They are not part of the state.
"""

NEVER: Final = float("inf")
BESIDE_SESSION: Final = "beside_session"
"""Cause of the retry of a scheduled task that no longer fits beside a session."""
BETTER_PLACE: Final = "better_place"
"""Cause of the retry of a session that moves."""
UNCOUNTED: Final = frozenset({BESIDE_SESSION, BETTER_PLACE})
"""Causes of retries that do not count against the limit of attempts."""
REVIEW_S: Final = 30.0
"""Time between two looks for a better place for a running session."""
HEAD_START_S: Final = 60.0
"""A task of priority p counts as admitted this time divided by p earlier."""
WORKED_S: Final = 60.0
"""An attempt of a session that has run for so long does not count against the limit of attempts."""


class Task:
    """A task that has not ended."""

    __slots__ = (
        "admitted_s",
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
        "uncounted",
        "waiting_since_s",
    )

    def __init__(self, submitted: TaskSubmitted, seq: int, now: float) -> None:
        self.submitted = submitted
        self.task_id = submitted.task_id
        self.seq = seq  # order of admission
        self.admitted_s = now  # ledger time
        self.state = TaskState.WAITING
        self.attempt = 1
        self.deadline_s = NEVER if submitted.deadline_s is None else now + submitted.deadline_s  # ledger time
        self.waiting_since_s = now  # when it last became WAITING
        self.placed: Placed | None = None  # the placement of the current attempt
        self.avoided: tuple[
            str, ...
        ] = ()  # nodes at which attempts failed since the task was last placed at one of them
        self.uncounted = 0  # attempts that do not count against the limit: see `counts`
        self.digest = 0  # the task's share of the state hash
        self.history: list[Happened] = []

    def rank(self, placed: Placed | None) -> Rank:
        """The task's place in line; `placed`: the placement that recorded it."""
        priority = self.submitted.priority
        head_start_s = 0.0 if priority is None else HEAD_START_S / priority
        admitted_s = self.admitted_s - head_start_s
        line = None if placed is None else placed.line
        return Rank(admitted_s, head_start_s, admitted_s if line is None else line.rank_s)

    def counts(self, cause: str, now: float) -> bool:
        """Whether an attempt that is retried now counts against the limit of attempts.

        It does not if the planner itself takes it back for the sake of a session, nor if it is of a session that worked for
        long.
        """
        if cause in UNCOUNTED:
            return False
        session = self.placed is not None and self.placed.session is not None
        return not (session and self.placed is not None and now - self.placed.start_s >= WORKED_S)

    def text(self, r: Reservation | None) -> str:
        """The text that enters the state hash: everything about the task that affects later decisions."""
        held = ""
        if r is not None:
            device = r.sender if r.computes else None
            held = f"{r.edge}|{device}|{r.start_s!r}|{r.end_s!r}|{r.slots}|{r.link1_bps}|{r.link2_bps}|{r.running}"
            held += f"|moved {r.moves}" if r.moves else ""
            held += f"|load {r.load.device} {r.load.edge}" if r.load is not None else ""
        return (
            f"task|{self.task_id}|{self.seq}|{self.state}|{self.attempt}|{self.deadline_s!r}|"
            f"{self.waiting_since_s!r}|{held}"
            # omitted when empty, so that older records, written without this field, keep their hash
            f"{'|avoids ' + ','.join(self.avoided) if self.avoided else ''}"
            f"{self._line_text()}"
            f"{f'|uncounted {self.uncounted}' if self.uncounted else ''}"
            f"{self._rest_text()}"
        )

    def _line_text(self) -> str:
        line = None if self.placed is None else self.placed.line
        return "" if line is None else f"|line {line.rank_s!r} {line.overtakes}"

    def _rest_text(self) -> str:
        rest = None if self.placed is None else self.placed.rest
        return "" if rest is None else f"|rest {rest.from_s!r} {rest.samples} {rest.delay_s!r} {rest.reroutes}"

    def __repr__(self) -> str:
        return f"<Task {self.task_id} {self.state} attempt {self.attempt}>"


ADDED_LATER: Final = ("draining", "link1_latency_s", "link2_latency_s")
"""Optional fields of an announcement that older records do not have."""

ADDED_LATER_TO_PROFILES: Final = tuple(
    name
    for name, field in ModelProfile.model_fields.items()
    if field.default is None and name not in ("whole_s", "sum_of_slices_s")
)
"""Optional fields of a profile that older records do not have."""


class KnownNode:
    """A node that has joined the region."""

    __slots__ = ("_texts", "announced", "batching", "digest", "draining", "reach", "rows")

    def __init__(self, announced: NodeAnnounced, table: RowTable) -> None:
        self.announced = announced
        self.rows: dict[str, PlatformRow] = {profile.model: table.row(profile) for profile in announced.models}
        self.batching = {profile.model: profile for profile in announced.models if profile.batch is not None}
        self.draining = announced.draining is True
        # These are omitted unless set, so that older records, written without these fields, keep their hash.
        left_out: dict[str, Any] = {name: True for name in ADDED_LATER if getattr(announced, name) is None}
        left_out["models"] = {
            at: {name for name in ADDED_LATER_TO_PROFILES if getattr(profile, name) is None}
            for at, profile in enumerate(announced.models)
        }
        self.digest = hash_of("node|" + announced.model_dump_json(exclude=left_out))
        # devices only, by model, consent to lossy codecs and samples in a batch; a cache, not part of the state
        self.reach: dict[tuple[str, float | None, int], tuple[int, Reached]] = {}
        self._texts: list[tuple[str, str]] | None = None

    def other_batches(self, before: KnownNode) -> list[str]:
        """The models that it computes in other batches than before."""
        batches, old = ({model: one.batch for model, one in node.batching.items()} for node in (self, before))
        return [model for model in self.rows if batches.get(model) != old.get(model)]

    def profile_texts(self) -> list[tuple[str, str]]:
        """Each profile as JSON without its platform, paired with the platform; computed once."""
        if self._texts is None:
            self._texts = [
                (profile.model_dump_json(exclude={"platform"}), profile.platform) for profile in self.announced.models
            ]
        return self._texts

    def __repr__(self) -> str:
        return f"<KnownNode {self.announced.role} {self.announced.node} {self.announced.incarnation}>"


class EndedTasks:
    """The most recently ended tasks, kept to recognise duplicate submissions. Bounded: the oldest is dropped first.

    Entries are hashed only when the state hash is read, so an entry added and dropped between two reads costs no hash.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._ended: OrderedDict[str, TaskState] = OrderedDict()
        self._fresh = 0  # number of newest entries that are not in the hash yet
        self._gone: list[tuple[str, TaskState]] = []  # dropped entries that are still in the hash
        self._contents: dict[
            str, int
        ] = {}  # `content_of` each submission, for tasks that ended since this process started

    def add(self, task_id: str, state: TaskState, submitted: TaskSubmitted) -> None:
        """Add a task, and drop the oldest one if the limit is exceeded."""
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
        """The change of the sum of all hashes since the last call."""
        change = sum(_ended_hash(*one) for one in islice(reversed(self._ended.items()), self._fresh))
        change -= sum(_ended_hash(*one) for one in self._gone)
        self._fresh = 0
        self._gone.clear()
        return change

    def get(self, task_id: str) -> TaskState | None:
        """The state in which a task ended, or None if the task is not in the list."""
        return self._ended.get(task_id)

    def content(self, task_id: str) -> int | None:
        """`content_of` the task's submission, or None if unknown."""
        return self._contents.get(task_id)

    def __len__(self) -> int:
        return len(self._ended)

    def to_state(self) -> list[list[str]]:
        """The entries as JSON values, oldest first."""
        return [[task_id, state.value] for task_id, state in self._ended.items()]

    def restore(self, state: list[list[Any]]) -> int:
        """Replace all entries by those of `to_state`. Return the sum of all hashes."""
        self._ended = OrderedDict((task_id, TaskState(value)) for task_id, value in state)
        self._fresh = 0
        self._gone.clear()
        self._contents.clear()
        return self.digest()

    def digest(self) -> int:
        """The sum of all hashes, computed from scratch."""
        return sum(_ended_hash(task_id, state) for task_id, state in self._ended.items())


def _ended_hash(task_id: str, state: TaskState) -> int:
    return hash_of(f"ended|{task_id}|{state}")


def content_of(submitted: TaskSubmitted) -> int:
    """A hash of a submission's content. A resent submission has the same one, since `submitted_at` is left out."""
    return hash_of(submitted.model_dump_json(exclude={"submitted_at"}))


def hash_of(text: str) -> int:
    """A 128-bit hash of a text. The state hash is the sum of such hashes, so it can be updated incrementally."""
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


HASH_MASK: Final = (1 << 128) - 1
