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
    DELAY_PARTS,
    MAX_ROUTES,
    Agreement,
    BitsPerSecond,
    Bytes,
    Execution,
    Frozen,
    Kind,
    ModelProfile,
    Name,
    NodeName,
    Objective,
    Parts,
    Placement,
    Role,
    SampleSeconds,
    Seconds,
)

MESSAGE_VERSION: Literal[1] = 1
MAX_MESSAGE_BYTES = 1_000_000
"""Size limit of a control message; larger ones are rejected before parsing."""

AttemptNumber = Annotated[int, Field(ge=1)]
Samples = Annotated[int, Field(ge=1, le=10_000_000)]


class Message(Frozen):
    """A record of a control topic."""

    v: Literal[1] = MESSAGE_VERSION  # message format version; others are rejected


# --- what a task reads -----------------------------------------------------------------------------------------------


class DatasetInput(Frozen):
    """Samples of a data set that every device has; available after a restart."""

    type: Literal["dataset"] = "dataset"  # selects the class
    name: Name  # e.g. "digits"
    start: Annotated[int, Field(ge=0, lt=1 << 63)] = 0  # first sample; the range wraps around


class SeedInput(Frozen):
    """Samples generated from a seed; available after a restart."""

    type: Literal["seed"] = "seed"  # selects the class
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]  # for numpy's default generator, one stream per sample


class HandleInput(Frozen):
    """Samples held only in the device's process; if it ends, the task ends as FAILED, `input_lost`."""

    type: Literal["handle"] = "handle"  # selects the class
    handle: Name  # the device's name for the samples


InputSource = Annotated[DatasetInput | SeedInput | HandleInput, Field(discriminator="type")]


# --- deepar.tasks ----------------------------------------------------------------------------------------------------


class SessionTerms(Frozen):
    """What the client of a session asks for."""

    rate_hz: Annotated[float, Field(gt=0, le=1e6)]  # samples a second that the placement must sustain
    latency_s: Annotated[float, Field(gt=0)] | None = (
        None  # target from a sample to its answer; None: as short as possible
    )


class TaskSubmitted(Message):
    """A device asks for `samples` inferences of `model`. An acknowledged task ends exactly once (G1)."""

    type: Literal["task_submitted"] = "task_submitted"  # selects the class
    task_id: Name  # unique; a second submission of the same id is ignored
    device: NodeName  # the device that holds the input and receives the result
    model: Name  # model name, never a path
    samples: Samples  # N, the number of samples
    input: InputSource  # source of the samples
    max_link1_bps: BitsPerSecond | None = None  # B1, the task's limit on link 1; None: the device's limit
    max_link2_bps: BitsPerSecond | None = None  # B2, the task's limit on link 2; None: no limit
    input_bytes: Bytes | None = None  # G(0) of one sample; None: the model's
    deadline_s: Annotated[float, Field(gt=0)] | None = None  # from admission; the task then ends as EXPIRED
    submitted_at: str | None = None  # ISO 8601 UTC, for display; no decision reads it
    session: SessionTerms | None = None  # an open-ended task, whose samples are not known yet; `samples` is then 1
    priority: Annotated[int, Field(ge=1, le=1_000)] | None = None  # 1 is the most urgent; None: the default
    tiers: Annotated[tuple[Role, ...], Field(min_length=1)] | None = None  # tiers that may compute; None: all
    min_agreement: Agreement | None = (
        None  # lossy codecs whose measured agreement is at least this may be used; None: lossless ones only
    )


class TaskCancelled(Message):
    """A client cancels a task, which ends as FAILED, cause `cancelled`."""

    type: Literal["task_cancelled"] = "task_cancelled"  # selects the class
    task_id: Name  # the task


# --- deepar.nodes ----------------------------------------------------------------------------------------------------


class NodeAnnounced(Message):
    """A node announces its role, capacity and model speeds. A new `incarnation` replaces the previous announcement."""

    type: Literal["node_announced"] = "node_announced"  # selects the class
    node: NodeName  # name of the node
    role: Role  # what the node does for tasks
    region: Annotated[int, Field(ge=0)] = 0  # the region whose planner it follows
    incarnation: Name  # new for each process start and each return after a loss
    lease_s: Annotated[float, Field(gt=0)] = 10.0  # the node is lost when silent for longer
    slots: Annotated[int, Field(ge=0, le=1_000_000)] = 0  # r_e, tasks that compute concurrently; edges only
    link1_capacity_bps: BitsPerSecond = 0  # B_e^1 of an edge; limit of a device, 0: no limit
    link2_capacity_bps: BitsPerSecond = 0  # B_e^2 of an edge
    link1_latency_s: SampleSeconds | None = None  # declared one-way latency of a device's link 1; None: not declared
    link2_latency_s: SampleSeconds | None = None  # the same of link 2; of an edge, and of a cloud, which plays it
    reachable_edges: tuple[NodeName, ...] | None = None  # E_i, edges that a device reaches; None: all
    models: tuple[ModelProfile, ...] = ()  # models that the node runs, with their speed
    draining: Literal[True] | None = None  # drains: finishes running tasks and accepts no new ones


class NodeLeft(Message):
    """A node leaves after it has drained."""

    type: Literal["node_left"] = "node_left"  # selects the class
    node: NodeName  # name of the node
    region: Annotated[int, Field(ge=0)] = 0  # partition of the control topics
    incarnation: Name  # of the node: one process start, or one return after a loss


# --- deepar.events ---------------------------------------------------------------------------------------------------


class LinkMeasurement(Frozen):
    """What a node measured on one of its links, on its own clock alone."""

    link: Literal[1, 2]  # 1: device to edge, 2: edge to cloud
    edge: NodeName  # the edge at one end of the link
    latency_s: SampleSeconds  # one-way latency of network and bus: half of a round trip, robust over recent probes
    deviation_s: SampleSeconds = 0.0  # deviation of the recent latencies
    bps: Annotated[int, Field(gt=0, le=1 << 50)] | None = None  # carried while more was to send; None: never so


class SpeedMeasurement(Frozen):
    """How fast a node without work runs a model, on its own clock alone."""

    model: Name  # the model
    factor: Annotated[float, Field(gt=0, le=1e6)]  # time of the whole model, relative to the announced profile


class NodeHeartbeat(Message):
    """A node renews its lease. The planner declares it lost after one lease without a heartbeat."""

    type: Literal["node_heartbeat"] = "node_heartbeat"  # selects the class
    node: NodeName  # name of the node
    incarnation: Name  # of the node: one process start, or one return after a loss
    links: Annotated[tuple[LinkMeasurement, ...], Field(max_length=100)] = ()  # a device: link 1; an edge: its link 2
    speeds: Annotated[tuple[SpeedMeasurement, ...], Field(max_length=100)] = ()  # measured while idle


class TaskProgress(Message):
    """Progress of a task, for display; no decision reads it."""

    type: Literal["task_progress"] = "task_progress"  # selects the class
    task_id: Name  # the task
    attempt: AttemptNumber  # attempt of the task, from 1
    node: NodeName  # name of the node
    done: Annotated[int, Field(ge=0)]  # samples with a result


class TaskCompleted(Message):
    """Every sample of a task has its result at the device."""

    type: Literal["task_completed"] = "task_completed"  # selects the class
    task_id: Name  # the task
    attempt: AttemptNumber  # the attempt that delivered the last result
    node: NodeName  # the device
    measured: Parts  # busy times, each on the clock of the node that measured it
    delay_s: Seconds  # from Start to the last result, on the device's clock
    wait_s: Seconds = 0.0  # from submission to Start, on the device's clock
    cloud: NodeName | None = None  # the cloud node that served the attempt, if it used one and the device knows
    route_samples: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=MAX_ROUTES)] | None = (
        None  # number of samples on each route of the placement; None: it has one, or the device does not know
    )
    edge_batches: Annotated[float, Field(gt=0, le=1e12)] | None = (
        None  # sum of 1/n over the samples that the edge computed, each in a batch of n; None: unknown, or one by one
    )
    cloud_batches: Annotated[float, Field(gt=0, le=1e12)] | None = None  # the same in the cloud


class TaskFailed(Message):
    """A stage reports that an attempt failed; the planner retries the task or ends it with this cause."""

    type: Literal["task_failed"] = "task_failed"  # selects the class
    task_id: Name  # the task
    attempt: AttemptNumber  # attempt of the task, from 1
    node: NodeName  # name of the node
    cause: Name  # a short, stable word: input_lost, bad_frame, unknown_model, ...
    detail: Annotated[str, Field(max_length=2000)] = ""  # explanation for display
    retryable: bool = False  # an attempt at another node may succeed


# --- deepar.decisions: the changes in a decision record ---------------------------------------------------


class TaskState(StrEnum):
    """The states of a task; `planner` holds the table of transitions."""

    WAITING = "WAITING"  # admitted; no usable resources yet
    SCHEDULED = "SCHEDULED"  # resources are reserved from a later time
    RUNNING = "RUNNING"  # it holds its resources
    COMPLETED = "COMPLETED"  # every result is at the device
    REJECTED = "REJECTED"  # the planner cannot place it
    FAILED = "FAILED"  # ended by an error or a cancellation
    EXPIRED = "EXPIRED"  # passed its deadline

    @property
    def ended(self) -> bool:
        """Whether the task is over."""
        return self not in (TaskState.WAITING, TaskState.SCHEDULED, TaskState.RUNNING)


class Admitted(Frozen):
    """The planner admits a task and is responsible for it until it ends."""

    type: Literal["admitted"] = "admitted"  # selects the class
    task: TaskSubmitted  # the submission


class PlacedOverhead(Frozen):
    """What a predicted delay contains beside the parts."""

    latency_s: Seconds = 0.0  # latencies of the links, over all samples
    task_s: float = 0.0  # overheads of the task and of its samples at no particular station
    deviation: Annotated[float, Field(ge=0)] = 0.0  # relative deviation of delays there from their predictions


class PlacedSession(Frozen):
    """How a placement serves a session. The delay and the parts of the placement are those of one sample."""

    rate_hz: Annotated[float, Field(gt=0)]  # samples a second that the placement sustains
    device_load: Annotated[float, Field(ge=0)] = 0.0  # share of the device's computing time that is booked
    edge_load: Annotated[float, Field(ge=0)] = 0.0  # slots of the edge that are booked, a fraction of one


class PlacedInLine(Frozen):
    """The place in line of a task that waits, or that is put before tasks that wait."""

    rank_s: float  # ledger time as of which it waits: that of its admission, corrected by priority and fairness
    overtakes: Annotated[int, Field(ge=0)] = 0  # scheduled tasks behind which it was not put


class PlacedRest(Frozen):
    """The samples that were left when a running task was last rerouted."""

    from_s: float  # ledger time of the reroute
    samples: Samples  # left then, as predicted
    delay_s: Seconds  # their predicted delay
    parts: Parts  # predicted parts of that delay
    reroutes: Annotated[int, Field(ge=1)]  # number of reroutes of the attempt so far
    before: tuple[
        Placement, ...
    ] = ()  # placements of the attempt before, oldest first: frames under way may follow them


class Placed(Frozen):
    """The planner places a task: nodes, bandwidth and start time."""

    type: Literal["placement"] = "placement"  # selects the class
    task_id: Name  # the task
    attempt: AttemptNumber  # attempt of the task, from 1
    device: NodeName  # the device of the task
    model: Name  # model name
    sha256: str  # of the profiled model file; stages reject other files
    samples: Samples  # number of samples
    policy: str  # name of the policy that chose the placement
    objective: Objective  # minimised by the policy
    execution: Execution  # how the stages process samples
    placement: Placement  # nodes, cuts and bandwidth
    start_s: float  # ledger time from which resources are reserved
    wait_s: Seconds  # start_s minus the time of the decision
    delay_s: Seconds  # w, predicted delay from the start
    parts: Parts  # predicted parts of the delay
    overhead: PlacedOverhead | None = None  # latency and overheads in delay_s; None: all zero
    session: PlacedSession | None = None  # of a session; None: a task with a known number of samples
    line: PlacedInLine | None = None  # None: in order of admission
    rest: PlacedRest | None = None  # of a task that was rerouted; only in the states of readers, never sent

    @property
    def slowest_s(self) -> float:
        """The predicted time between two samples of the task at its slowest station."""
        busy_s: list[float] = [self.placement.apart(part) * getattr(self.parts, f"{part}_s") for part in DELAY_PARTS]
        return max(busy_s) / self.samples


class BandwidthGrant(Frozen):
    """A share of a link for a task's life: constraint (9) on link 1, (10) on link 2."""

    type: Literal["bandwidth_grant"] = "bandwidth_grant"  # selects the class
    task_id: Name  # the task
    attempt: AttemptNumber  # attempt of the task, from 1
    edge: NodeName  # the edge whose link is shared
    link: Literal[1, 2]  # 1: device to edge, 2: edge to cloud
    bps: Annotated[int, Field(gt=0)]  # reserved bits per second
    from_s: float  # ledger time


class Start(Frozen):
    """The task's resources are free and assigned to it: the device starts."""

    type: Literal["start"] = "start"  # selects the class
    task_id: Name  # the task
    attempt: AttemptNumber  # attempt of the task, from 1
    device: NodeName  # the device of the task
    at_s: float  # ledger time


class Moved(Frozen):
    """Scheduled tasks get new start times because a task ahead of them changed; one change covers a whole queue."""

    type: Literal["moved"] = "moved"  # selects the class
    task_ids: tuple[Name, ...]  # in the order of their previous starts
    starts_s: tuple[float, ...]  # new start of each task, ledger time
    overtaken: Literal[True] | None = None  # by a task with a better rank; such moves do not count

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.task_ids) != len(self.starts_s):
            raise ValueError(f"{len(self.task_ids)} tasks are moved to {len(self.starts_s)} starts")
        return self


class Overran(Frozen):
    """A running task passed its predicted end; it keeps its resources, and the planner assumes a later end."""

    type: Literal["overran"] = "overran"  # selects the class
    task_id: Name  # the task
    attempt: AttemptNumber  # attempt of the task, from 1
    from_s: float  # predicted end, now past
    to_s: float  # end assumed from now on


class Rerouted(Frozen):
    """A running task goes on with another placement: the samples without a result take other cuts, routes or bandwidth.

    The attempt stays the same. Samples under way begin again.
    """

    type: Literal["rerouted"] = "rerouted"  # selects the class
    task_id: Name  # the task
    attempt: AttemptNumber  # the running attempt
    device: NodeName  # the device of the task
    placement: Placement  # nodes, cuts and bandwidth from now on
    from_s: float  # ledger time
    samples: Samples  # left of the task, as predicted
    delay_s: Seconds  # predicted delay of these samples
    parts: Parts  # predicted parts of that delay
    overhead: PlacedOverhead | None = None  # latency and overheads in delay_s; None: all zero

    def applied_to(self, placed: Placed, start_s: float) -> Placed:
        """The placement of an attempt that started at `start_s`. Delay and parts are those of the whole task."""
        old = placed.rest
        samples, parts = (placed.samples, placed.parts) if old is None else (old.samples, old.parts)
        replaced = self.samples / samples
        changed = {
            "placement": self.placement,
            "delay_s": max(0.0, self.from_s - start_s) + self.delay_s,
            "parts": placed.parts.plus(parts, -replaced).plus(self.parts),
            "overhead": self.overhead,
            "rest": PlacedRest(
                from_s=self.from_s,
                samples=self.samples,
                delay_s=self.delay_s,
                parts=self.parts,
                reroutes=1 if old is None else old.reroutes + 1,
                before=(placed.placement,) if old is None else (*old.before, placed.placement),
            ),
        }
        return placed.model_copy(update=changed)


class Retried(Frozen):
    """The planner releases a task's resources and plans a new attempt; older attempts are fenced."""

    type: Literal["retried"] = "retried"  # selects the class
    task_id: Name  # the task
    attempt: AttemptNumber  # the new attempt
    cause: Name  # node_lost, capacity_lowered, ...
    detail: str = ""  # explanation for display
    failed_at: NodeName | None = None  # node where the attempt failed; the task avoids it if possible


class Ended(Frozen):
    """A task ends and releases its resources."""

    type: Literal["ended"] = "ended"  # selects the class
    task_id: Name  # the task
    attempt: AttemptNumber  # attempt of the task, from 1
    state: TaskState  # COMPLETED, REJECTED, FAILED or EXPIRED
    cause: str = ""  # a short, stable word; empty if COMPLETED
    detail: str = ""  # explanation for display
    edge: NodeName | None = None  # the edge that held the released resources
    released_slots: int = 0  # compute slots released
    released_link1_bps: BitsPerSecond = 0  # bandwidth released on link 1
    released_link2_bps: BitsPerSecond = 0  # bandwidth released on link 2
    measured: Parts | None = None  # reported by the device
    delay_s: Seconds | None = None  # reported by the device


class NodeJoined(Frozen):
    """A node joins the region, returns to it, or changes its announcement."""

    type: Literal["node_joined"] = "node_joined"  # selects the class
    node: NodeAnnounced  # its announcement


class NodeLost(Frozen):
    """A node left or its lease expired; the planner retries the tasks that ran there."""

    type: Literal["node_lost"] = "node_lost"  # selects the class
    node: NodeName  # name of the node
    incarnation: Name  # of the node: one process start, or one return after a loss
    cause: Name  # lease_expired, left, replaced


class CircuitChanged(Frozen):
    """A node's circuit breaker changed: an attempt failed there, or succeeded after failures."""

    type: Literal["circuit_changed"] = "circuit_changed"  # selects the class
    node: NodeName  # name of the node
    failures: Annotated[int, Field(ge=0)]  # consecutive failed attempts; 0: the node works again
    until_s: float | None = None  # ledger time until which the node is avoided; None: not avoided


class LearnedNode(Frozen):
    """The estimate of a model on a node, after one more observation.

    busy_s is about factor * profile_s + overhead_s * samples.
    """

    node: NodeName  # the node
    model: Name  # the model
    alone: bool = False  # a device that ran the whole model: no activations were packed, sent or received meanwhile
    samples: Samples  # observed: samples of the task
    profile_s: Seconds  # observed: time of all samples by the profile
    busy_s: Seconds  # observed: measured busy time
    factor: Annotated[float, Field(gt=0)]  # estimate: how much slower than its profile the node is
    overhead_s: Seconds  # estimate: busy time of one sample beside its layers
    kept: Annotated[int, Field(ge=1)]  # observations that the estimate still uses, this one included


class LearnedPath(Frozen):
    """The estimate of a path, after one more observation: gap_s is about task_s + sample_s * samples."""

    device: NodeName  # the device
    edge: NodeName | None = None  # the edge; None: the device alone
    kind: Kind  # the tiers that the path passes, whether they compute or not
    samples: Samples  # observed: samples of the task
    delay_s: Seconds  # observed: measured delay
    gap_s: float  # observed: the share of the delay that parts and latencies do not explain
    error: float  # observed: measured over predicted delay, minus 1
    task_s: float  # estimate: overhead of a task
    sample_s: float  # estimate: overhead of a sample
    deviation: Annotated[float, Field(ge=0)]  # estimate: deviation of the errors
    kept: Annotated[int, Field(ge=1)]  # observations that the estimate still uses, this one included


class LearnedLink(Frozen):
    """The estimate of a link, after a measurement."""

    link: Literal[1, 2]  # 1: device to edge, 2: edge to cloud
    device: NodeName | None = None  # the device, of link 1
    edge: NodeName  # the edge
    latency_s: Seconds  # estimate: one-way latency
    bps: Annotated[int, Field(gt=0)] | None = None  # estimate: limit of grants; None: as announced
    slow: tuple[tuple[int, int], ...] | None = (
        None  # observed: bps granted and carried, last slow transfers; None: as before
    )


class LearnedSpeed(Frozen):
    """A node without work has become clearly slower or faster. If faster, what tasks showed of it before is stale."""

    node: NodeName  # the node
    model: Name  # the model
    factor: Annotated[float, Field(gt=0)]  # time of the whole model, relative to the announced profile


class StaleEstimate(Frozen):
    """An estimate that was not confirmed for long: it moves towards its prior, so that the node or path is tried again."""

    node: NodeName  # the node, or the device of a path
    model: Name | None = None  # the model, of a node
    alone: bool = False  # of a device that runs the whole model
    edge: NodeName | None = None  # the edge, of a path
    kind: Kind | None = None  # the kind, of a path


class Learned(Frozen):
    """The planner learned from a completed task or a heartbeat; the only change that adds observations to estimates."""

    type: Literal["learned"] = "learned"  # selects the class
    task_id: Name | None = None  # the task that was measured; None: a heartbeat
    attempt: AttemptNumber | None = None  # the attempt that was measured
    nodes: tuple[LearnedNode, ...] = ()  # speed of a model on a node
    paths: tuple[LearnedPath, ...] = ()  # overheads between a device and an edge
    links: tuple[LearnedLink, ...] = ()  # latency and bandwidth of links
    speeds: tuple[LearnedSpeed, ...] = ()  # what nodes measured of themselves
    stale: tuple[StaleEstimate, ...] = ()  # estimates that move towards their prior
    cloud: NodeName | None = None  # the cloud node that served the task, if it is known


Change = Annotated[
    Admitted
    | Placed
    | BandwidthGrant
    | Start
    | Moved
    | Overran
    | Rerouted
    | Retried
    | Ended
    | NodeJoined
    | NodeLost
    | CircuitChanged
    | Learned,
    Field(discriminator="type"),
]


class EpochOpened(Message):
    """A planner claims a region. The first record of an epoch wins; lower epochs are dropped (G4)."""

    type: Literal["epoch_opened"] = "epoch_opened"  # selects the class
    region: Annotated[int, Field(ge=0)]  # partition of the control topics
    epoch: Annotated[int, Field(ge=1)]  # highest seen + 1
    nonce: Name  # distinguishes planners that open the same epoch
    planner: NodeName  # name of the planner
    lease_s: Annotated[float, Field(gt=0)]  # another planner may take over when silent for longer
    identity: Name | None = None  # fingerprint of the master for proofs; None: not required
    at: str | None = None  # ISO 8601 UTC, for display


class PlannerHeartbeat(Message):
    """The leading planner is alive and has nothing to decide."""

    type: Literal["planner_heartbeat"] = "planner_heartbeat"  # selects the class
    region: Annotated[int, Field(ge=0)]  # partition of the control topics
    epoch: Annotated[int, Field(ge=1)]  # leader term of the planner
    nonce: Name  # distinguishes planners that open the same epoch


class PlannerLeft(Message):
    """The leading planner leaves: another may take over at once."""

    type: Literal["planner_left"] = "planner_left"  # selects the class
    region: Annotated[int, Field(ge=0)]  # partition of the control topics
    epoch: Annotated[int, Field(ge=1)]  # leader term of the planner
    nonce: Name  # distinguishes planners that open the same epoch


class DecisionPart(Message):
    """Some changes of a step too large for one record. They take effect only when its `Decision` follows."""

    type: Literal["decision_part"] = "decision_part"  # selects the class
    region: Annotated[int, Field(ge=0)]  # partition of the control topics
    epoch: Annotated[int, Field(ge=1)]  # leader term of the planner
    nonce: Name  # distinguishes planners that open the same epoch
    seq: Annotated[int, Field(ge=1)]  # sequence number of its decision
    part: Annotated[int, Field(ge=1)]  # counts from 1
    changes: tuple[Change, ...]  # some changes of the step, in order


class Decision(Message):
    """Every change of state made in one step. Readers take only the open (epoch, nonce) and seq = previous + 1."""

    type: Literal["decision"] = "decision"  # selects the class
    region: Annotated[int, Field(ge=0)]  # partition of the control topics
    epoch: Annotated[int, Field(ge=1)]  # leader term of the planner
    nonce: Name  # distinguishes planners that open the same epoch
    seq: Annotated[int, Field(ge=1)]  # counts from 1 across all epochs of the region
    now_s: float  # ledger time of the step
    inputs: dict[str, int]  # topic -> next offset to read in the region's partition, after this step
    changes: tuple[Change, ...]  # applied after the changes of its parts
    parts: Annotated[int, Field(ge=1)] | None = None  # number of its DecisionPart records; None: none
    ledger_hash: str  # hash of the planner's state after the step; a replay must match
    at: str | None = None  # ISO 8601 UTC, for display


# --- deepar.snapshots ------------------------------------------------------------------------------------------------


MAX_PARTS = 10_000
PartCount = Annotated[int, Field(ge=0, le=MAX_PARTS)]


class SnapshotPart(Message):
    """A piece of a state too large for one record. Valid only with the `Snapshot` that lists it."""

    type: Literal["snapshot_part"] = "snapshot_part"  # selects the class
    region: Annotated[int, Field(ge=0)]  # partition of the control topics
    seq: int  # decision after which the state was taken
    part: Annotated[int, Field(ge=1)]  # counts from 1
    state: dict[str, list[Any]]  # beginnings of the lists in the snapshot's state


class Snapshot(Message):
    """The planner's whole state after a decision, from which a restart continues. Written after its parts."""

    type: Literal["snapshot"] = "snapshot"  # selects the class
    region: Annotated[int, Field(ge=0)]  # partition of the control topics
    epoch: Annotated[int, Field(ge=1)]  # leader term of the planner
    nonce: Name  # distinguishes planners that open the same epoch
    seq: int  # last decision included in the state
    offset: Annotated[int, Field(ge=0)]  # of that decision on deepar.decisions; readers continue after it
    now_s: float  # ledger time
    inputs: dict[str, int]  # topic -> next offset to read
    ledger_hash: str  # hash of the planner's state
    place: Annotated[int, Field(ge=0, le=100)] = 0  # storage place among the last few snapshots; part of the keys
    widths: Annotated[tuple[PartCount, ...], Field(max_length=100)] = ()  # number of parts at each place
    first: Annotated[int, Field(ge=0)] = 0  # offset on deepar.snapshots of its first part, or earlier
    parts: Annotated[tuple[str, ...], Field(max_length=MAX_PARTS)] = ()  # digest of each part's record, in order
    state: dict[str, Any]  # the planner's state; its lists continue those of the parts


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
