"""Control messages: JSON on the wire, frozen and validated pydantic values in the process.

Every message has a `type`, which selects its class, and a version `v`. Field comments give the unit; times named `_s` that
are moments rather than spans are on the *region's* ledger clock, never on a remote wall clock.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from bus.errors import ProtocolError
from bus.validation import first_fault
from bus.values import (
    BitsPerSecond,
    Bytes,
    Execution,
    Frozen,
    ModelProfile,
    Name,
    NodeName,
    Objective,
    Parts,
    Placement,
    Role,
    Seconds,
)

MESSAGE_VERSION: Literal[1] = 1
MAX_MESSAGE_BYTES = 1_000_000
"""A control message over this size is refused before it is parsed."""

Attempt = Annotated[int, Field(ge=1)]
Samples = Annotated[int, Field(ge=1, le=10_000_000)]


class Message(Frozen):
    """What stands on a control topic."""

    v: Literal[1] = MESSAGE_VERSION  # a message of another version is refused


# --- what a task reads -----------------------------------------------------------------------------------------------


class DatasetInput(Frozen):
    """A range of a data set that every device has; it survives a restart."""

    type: Literal["dataset"] = "dataset"
    name: Name  # e.g. "digits"
    start: Annotated[int, Field(ge=0, lt=1 << 63)] = 0  # first sample; the range wraps around


class SeedInput(Frozen):
    """Samples made from a seed; it survives a restart."""

    type: Literal["seed"] = "seed"
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]  # of numpy's default generator, one stream a sample


class HandleInput(Frozen):
    """Samples that only the device's process holds: lost with it (FAILED, `input_lost`)."""

    type: Literal["handle"] = "handle"
    handle: Name  # what the device calls it


InputSource = Annotated[DatasetInput | SeedInput | HandleInput, Field(discriminator="type")]


# --- deepar.tasks ----------------------------------------------------------------------------------------------------


class TaskSubmitted(Message):
    """A device asks for `samples` inferences of `model`. Once acknowledged it ends in exactly one way (G1)."""

    type: Literal["task_submitted"] = "task_submitted"
    task_id: Name  # unique; a second submission of the same id is ignored
    device: NodeName  # where the input is and the result goes
    model: Name  # by name, never by path
    samples: Samples  # N
    input: InputSource  # where the samples come from
    max_link1_bps: BitsPerSecond | None = None  # B1 of the task, None: the device's own limit
    max_link2_bps: BitsPerSecond | None = None  # B2 of the task, None: no limit of its own
    input_bytes: Bytes | None = None  # G(0) where it differs from the model's
    deadline_s: Annotated[float, Field(gt=0)] | None = None  # after the planner has read it; then EXPIRED
    submitted_at: str | None = None  # ISO 8601 UTC, for people; no decision reads it


class TaskCancelled(Message):
    """Somebody wants a task ended: FAILED, cause `cancelled`."""

    type: Literal["task_cancelled"] = "task_cancelled"
    task_id: Name


# --- deepar.nodes ----------------------------------------------------------------------------------------------------


class NodeAnnounced(Message):
    """A node tells what it is and how fast it runs its models. A new `incarnation` replaces all that was."""

    type: Literal["node_announced"] = "node_announced"
    node: NodeName
    role: Role
    region: Annotated[int, Field(ge=0)] = 0  # whose planner it obeys
    incarnation: Name  # one for each start of the process or return from a loss
    lease_s: Annotated[float, Field(gt=0)] = 10.0  # silent for longer means lost
    slots: Annotated[int, Field(ge=0, le=1_000_000)] = 0  # r_e: tasks computing at once; edges only
    link1_capacity_bps: BitsPerSecond = 0  # B_e^1 of an edge; of a device its own limit, 0: none
    link2_capacity_bps: BitsPerSecond = 0  # B_e^2 of an edge
    reachable_edges: tuple[NodeName, ...] | None = None  # E_i of a device; None: every edge
    models: tuple[ModelProfile, ...] = ()  # what it can run, and how fast
    draining: Literal[True] | None = None  # it is about to leave: it finishes what runs there and wants nothing new


class NodeLeft(Message):
    """A node goes politely, after it has drained."""

    type: Literal["node_left"] = "node_left"
    node: NodeName
    region: Annotated[int, Field(ge=0)] = 0
    incarnation: Name


# --- deepar.events ---------------------------------------------------------------------------------------------------


class NodeHeartbeat(Message):
    """A node is alive; renews its lease. Its loss is declared only after a whole lease."""

    type: Literal["node_heartbeat"] = "node_heartbeat"
    node: NodeName
    incarnation: Name


class TaskProgress(Message):
    """How far a task is, for people; the planner does not decide by it."""

    type: Literal["task_progress"] = "task_progress"
    task_id: Name
    attempt: Attempt
    node: NodeName
    done: Annotated[int, Field(ge=0)]  # samples with a result


class TaskCompleted(Message):
    """Every sample of a task has its result at the device."""

    type: Literal["task_completed"] = "task_completed"
    task_id: Name
    attempt: Attempt  # the attempt that was running when the last result came
    node: NodeName  # the device
    measured: Parts  # busy times, each by the clock of who was busy
    delay_s: Seconds  # from reading the Start to the last result, the device's clock
    wait_s: Seconds = 0.0  # from the submission to the Start, the device's clock


class TaskFailed(Message):
    """A stage cannot go on with a task, whatever the reason; the planner ends it with this cause."""

    type: Literal["task_failed"] = "task_failed"
    task_id: Name
    attempt: Attempt
    node: NodeName
    cause: Name  # a short, stable word: input_lost, bad_frame, unknown_model, ...
    detail: Annotated[str, Field(max_length=2000)] = ""  # for people
    retryable: bool = False  # another attempt elsewhere could succeed


# --- deepar.decisions: the changes a decision record is made of ---------------------------------------------------


class TaskState(StrEnum):
    """The states of a task; the table of transitions stands in `planner`."""

    WAITING = "WAITING"  # admitted; nothing it may use is there yet
    SCHEDULED = "SCHEDULED"  # reserved from a later instant on
    RUNNING = "RUNNING"  # its resources are its own
    COMPLETED = "COMPLETED"
    REJECTED = "REJECTED"
    FAILED = "FAILED"
    EXPIRED = "EXPIRED"

    @property
    def ended(self) -> bool:
        """Whether the task is over."""
        return self not in (TaskState.WAITING, TaskState.SCHEDULED, TaskState.RUNNING)


class Admitted(Frozen):
    """The planner has read a task and will see it to its end."""

    type: Literal["admitted"] = "admitted"
    task: TaskSubmitted


class Placed(Frozen):
    """Where, with how much, and from when a task will run."""

    type: Literal["placement"] = "placement"
    task_id: Name
    attempt: Attempt
    device: NodeName
    model: Name
    sha256: str  # of the model that was profiled; stages refuse another
    samples: Samples
    policy: str  # who decided
    objective: Objective  # what was minimised
    execution: Execution  # what the stages are to do
    placement: Placement
    start_s: float  # ledger time from which everything is reserved
    wait_s: Seconds  # start_s - now
    delay_s: Seconds  # w, predicted from the start
    parts: Parts  # predicted


class BandwidthGrant(Frozen):
    """A share of a link for a task's life: constraint (9) on link 1, (10) on link 2."""

    type: Literal["bandwidth_grant"] = "bandwidth_grant"
    task_id: Name
    attempt: Attempt
    edge: NodeName
    link: Literal[1, 2]
    bps: Annotated[int, Field(gt=0)]
    from_s: float  # ledger time


class Start(Frozen):
    """The resources are actually free, and now the task's: go."""

    type: Literal["start"] = "start"
    task_id: Name
    attempt: Attempt
    device: NodeName
    at_s: float  # ledger time


class Moved(Frozen):
    """Scheduled tasks start at other instants, because what stands before them changed: a whole queue in one change."""

    type: Literal["moved"] = "moved"
    task_ids: tuple[Name, ...]  # in the order of the starts that they were promised
    starts_s: tuple[float, ...]  # ledger time: the start that each is promised now

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.task_ids) != len(self.starts_s):
            raise ValueError(f"{len(self.task_ids)} tasks are moved to {len(self.starts_s)} starts")
        return self


class Overran(Frozen):
    """A running task has passed its predicted end; it keeps what it holds, and others plan with this end instead."""

    type: Literal["overran"] = "overran"
    task_id: Name
    attempt: Attempt
    from_s: float  # the predicted end that has passed
    to_s: float  # the end assumed now


class Retried(Frozen):
    """What a task had is taken back; it is planned again under a new attempt, older attempts are fenced."""

    type: Literal["retried"] = "retried"
    task_id: Name
    attempt: Attempt  # the new one
    cause: Name  # node_lost, capacity_lowered, ...
    detail: str = ""
    failed_at: NodeName | None = None  # where the attempt failed; the task avoids it while it can


class Ended(Frozen):
    """A task is over, and what it held is free."""

    type: Literal["ended"] = "ended"
    task_id: Name
    attempt: Attempt
    state: TaskState  # COMPLETED, REJECTED, FAILED or EXPIRED
    cause: str = ""  # a short, stable word unless COMPLETED
    detail: str = ""  # for people
    edge: NodeName | None = None  # where the released resources lie
    released_slots: int = 0
    released_link1_bps: BitsPerSecond = 0
    released_link2_bps: BitsPerSecond = 0
    measured: Parts | None = None  # as the device reported
    delay_s: Seconds | None = None  # as the device reported


class NodeJoined(Frozen):
    """A node is part of the region from here on (or is back, or has changed)."""

    type: Literal["node_joined"] = "node_joined"
    node: NodeAnnounced


class NodeLost(Frozen):
    """A node has been silent for a whole lease, or has left; what ran there is planned again."""

    type: Literal["node_lost"] = "node_lost"
    node: NodeName
    incarnation: Name
    cause: Name  # lease_expired, left, replaced


class CircuitChanged(Frozen):
    """An attempt failed at a node, or one succeeded there after others had failed."""

    type: Literal["circuit_changed"] = "circuit_changed"
    node: NodeName
    failures: Annotated[int, Field(ge=0)]  # attempts that failed there in a row; 0: it works again
    until_s: float | None = None  # ledger time until which the node is avoided; None: it is not


Change = Annotated[
    Admitted
    | Placed
    | BandwidthGrant
    | Start
    | Moved
    | Overran
    | Retried
    | Ended
    | NodeJoined
    | NodeLost
    | CircuitChanged,
    Field(discriminator="type"),
]


class EpochOpened(Message):
    """A planner claims a region. The first record of an epoch wins; lower epochs are dropped (G4)."""

    type: Literal["epoch_opened"] = "epoch_opened"
    region: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=1)]  # highest seen + 1
    nonce: Name  # tells apart two planners that open the same epoch
    planner: NodeName  # who
    lease_s: Annotated[float, Field(gt=0)]  # silent for longer, and another may take over
    identity: Name | None = None  # fingerprint of the master by whose keys senders prove who they are; None: no need
    at: str | None = None  # ISO 8601 UTC, for people


class PlannerHeartbeat(Message):
    """The planner in charge is alive though it has nothing to decide."""

    type: Literal["planner_heartbeat"] = "planner_heartbeat"
    region: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=1)]
    nonce: Name


class PlannerLeft(Message):
    """The planner in charge goes politely: another may take over at once."""

    type: Literal["planner_left"] = "planner_left"
    region: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=1)]
    nonce: Name


class DecisionPart(Message):
    """More changes of a step that fits no single record. They count once its `Decision` stands behind them, else never."""

    type: Literal["decision_part"] = "decision_part"
    region: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=1)]
    nonce: Name
    seq: Annotated[int, Field(ge=1)]  # of the decision that it is a part of
    part: Annotated[int, Field(ge=1)]  # counts from 1
    changes: tuple[Change, ...]


class Decision(Message):
    """Every change of state made in one step. Readers take only the open (epoch, nonce) and seq = previous + 1."""

    type: Literal["decision"] = "decision"
    region: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=1)]
    nonce: Name
    seq: Annotated[int, Field(ge=1)]  # counts from 1 over the life of the region, not of the epoch
    now_s: float  # ledger time of the step
    inputs: dict[str, int]  # topic -> next offset to read in the region's partition, after this step
    changes: tuple[Change, ...]  # behind those of its parts, where there are any
    parts: Annotated[int, Field(ge=1)] | None = None  # how many records of it stand before this one; None: this is all
    ledger_hash: str  # of the planner's state after the step; a replay must arrive at the same
    at: str | None = None  # ISO 8601 UTC, for people


# --- deepar.snapshots ------------------------------------------------------------------------------------------------


MAX_PARTS = 10_000
PartCount = Annotated[int, Field(ge=0, le=MAX_PARTS)]


class SnapshotPart(Message):
    """A piece of a state that fits no single record. It means nothing without the `Snapshot` that names it."""

    type: Literal["snapshot_part"] = "snapshot_part"
    region: Annotated[int, Field(ge=0)]
    seq: int  # of the decision after which the state was taken
    part: Annotated[int, Field(ge=1)]  # counts from 1
    state: dict[str, list[Any]]  # more of the lists of the snapshot's state


class Snapshot(Message):
    """The planner's whole state after a decision, so that a restart need not read all history. Written behind its parts."""

    type: Literal["snapshot"] = "snapshot"
    region: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=1)]
    nonce: Name
    seq: int  # of the last decision folded in
    offset: Annotated[int, Field(ge=0)]  # of that decision on deepar.decisions; reading goes on behind it
    now_s: float  # ledger time
    inputs: dict[str, int]
    ledger_hash: str
    place: Annotated[int, Field(ge=0, le=100)] = 0  # where among the last few it is kept: part of the keys
    widths: Annotated[tuple[PartCount, ...], Field(max_length=100)] = ()  # by place: how many parts stand there
    first: Annotated[int, Field(ge=0)] = 0  # no part stands before this offset on deepar.snapshots
    parts: Annotated[tuple[str, ...], Field(max_length=MAX_PARTS)] = ()  # the digest of each part's record, in order
    state: dict[str, Any]  # the planner's own; see planner. Its lists go on where those of the parts end


# --- the one table from topic to message ---------------------------------------------------------------------------

TaskMessage = Annotated[TaskSubmitted | TaskCancelled, Field(discriminator="type")]
NodeMessage = Annotated[NodeAnnounced | NodeLeft, Field(discriminator="type")]
EventMessage = Annotated[NodeHeartbeat | TaskProgress | TaskCompleted | TaskFailed, Field(discriminator="type")]
DecisionMessage = Annotated[
    EpochOpened | PlannerHeartbeat | PlannerLeft | DecisionPart | Decision, Field(discriminator="type")
]
SnapshotMessage = Annotated[Snapshot | SnapshotPart, Field(discriminator="type")]

_adapters: dict[str, TypeAdapter[Any]] = {
    "deepar.tasks": TypeAdapter(TaskMessage),
    "deepar.nodes": TypeAdapter(NodeMessage),
    "deepar.events": TypeAdapter(EventMessage),
    "deepar.decisions": TypeAdapter(DecisionMessage),
    "deepar.snapshots": TypeAdapter(SnapshotMessage),
}


def adapter(topic: str) -> TypeAdapter[Any]:
    """The pydantic adapter of a control topic (for schemas). Raises KeyError for a topic that carries no JSON."""
    return _adapters[topic]


def encode(message: Message) -> bytes:
    """A control message as UTF-8 JSON, without fields that are None."""
    return message.__pydantic_serializer__.to_json(message, exclude_none=True)


def decode(topic: str, payload: bytes | None) -> Any:
    """The message of a control topic. Raises `ProtocolError` with cause `oversized`, `undecodable`, or `unknown_version`."""
    if payload is None or not payload:
        raise ProtocolError("undecodable", "the record is empty")
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError("oversized", f"{len(payload):,} bytes, over {MAX_MESSAGE_BYTES:,}")
    try:
        return _adapters[topic].validate_json(payload)
    except ValidationError as error:
        place = error.errors(include_url=False, include_input=False)[0]["loc"]
        cause = "unknown_version" if place[-1:] == ("v",) else "undecodable"
        raise ProtocolError(cause, first_fault(error)) from None
