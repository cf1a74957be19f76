"""Planted bugs, to see that the simulation finds them: each breaks one promise.

A canary gives the region other programs: a variant of a role, or the real role with a variant of one component
(`StageComponents`, `CoreComponents`, `ServiceComponents`). A variant changes public methods only, so that a refactoring of
the programs leaves it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import zstandard

from bus import messages, snapshots, topics
from bus.decisions import DecisionLog, DecisionTopicMessage, Dropped
from bus.errors import BusError, ModelError
from bus.frames import Frame
from bus.messages import Decision, Ended, EpochOpened, Message, NodeAnnounced, Rerouted, Snapshot, Start, TaskCompleted
from bus.port import Bus, Position, Reader, Record, RecordValue, TopicPartition
from bus.tensors import Array, Assembler, Encoded, Piece
from bus.values import Role
from loadgen.chaos.simulated.region import LAYER_S
from loadgen.sim.programs import Programs
from planner.core.core import CoreComponents, PlannerCore
from planner.core.placing import QueueLimits
from planner.core.region.records import Task
from planner.core.teacher import Teacher
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import Reservation
from planner.search.ledger.timeline import Timeline
from planner.service.leader_term import LeaderTerm
from planner.service.service import PlannerService, ServiceComponents
from stages.batches import Batcher, Computed
from stages.components import StageComponents
from stages.devices.attempt import DeviceAttempt, RunningAttempt
from stages.devices.device import Device
from stages.devices.session import DeviceSession, PushedFrame
from stages.hops.cloud_stage import CloudStage
from stages.hops.edge_stage import EdgeStage
from stages.hops.flow import Flow
from stages.hops.hop import Hop
from stages.membership.fences import Fences
from stages.membership.lease import Lease
from stages.network.frame_sender import FrameSender
from stages.node import Node
from stages.offsets import OffsetLedger, Receipt
from stages.runner import ModelledSample
from stages.sample_ranges import SampleRanges
from stages.window import MissingResults, Window

ComputeBatch = Callable[[Sequence[ModelledSample]], Awaitable[tuple[Sequence[list[Array]], float]]]
"""See `Batcher`."""


@dataclass(frozen=True, slots=True)
class Canary:
    """One planted bug."""

    name: str
    what: str  # in words
    within: int  # seeds, counted from 0, within which it must be caught
    programs: Programs  # what the region's processes run


def stage(**variants: Any) -> Programs:
    """Programs whose nodes have these components."""
    return Programs(node=partial(Node, components=StageComponents(**variants)))


def core(**variants: Any) -> Programs:
    """Programs whose planners' cores have these components."""
    return Programs(core=partial(PlannerCore, components=CoreComponents(**variants)))


def service(**variants: Any) -> Programs:
    """Programs whose planner services have these components."""
    return Programs(planner=partial(PlannerService, components=ServiceComponents(**variants)))


# --- the device ------------------------------------------------------------------------------------------------------


class NeverRemoved(MissingResults):
    """Takes each result for the first one of its sample."""

    def remove(self, sample: int) -> bool:
        super().remove(sample)
        return True


class NeverGivenBack(Window):
    """A result does not free a place."""

    def give(self) -> None:
        return


class Boundless(Window):
    """Has a place for every sample."""

    def open(self, size: int) -> None:
        super().open(1 << 12)


class PatientAttempt(DeviceAttempt):
    """Waits for ever for results."""

    def __init__(self, *arguments: Any) -> None:
        device, known, plan, todo, on_result, _ = arguments
        super().__init__(device, known, plan, todo, on_result, patience_s=1e9)


class ForgetfulSession(DeviceSession):
    """Does not repeat the frames that were under way when an attempt ended."""

    repeated = 0

    def interrupt(self) -> None:
        waiting = self.waiting
        super().interrupt()
        self.repeated += self.waiting - waiting

    async def take(self) -> tuple[int, PushedFrame] | None:
        while self.repeated:
            self.repeated -= 1
            await super().take()
        return await super().take()


class ForgetfulDevice(Device):
    """Overlooks a start while another attempt runs."""

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
        changes = [one for one in decision.changes if not (isinstance(one, Start) and self._has_started(one.task_id))]
        super().on_decision(decision.model_copy(update={"changes": tuple(changes)}), fenced)

    def _has_started(self, task_id: str) -> bool:
        known = self.tasks.get(task_id)
        return known is not None and known.started_s is not None


class OldSharesDevice(Device):
    """Goes on under the plan that it began with when a task is rerouted."""

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
        changes = tuple(one for one in decision.changes if not isinstance(one, Rerouted))
        super().on_decision(decision.model_copy(update={"changes": changes}), fenced)


class UnfencedDevice(Device):
    """Takes results of fenced attempts like any other."""

    def attempt_for(self, frame: Frame) -> RunningAttempt | None:
        known = self.tasks.get(frame.task_id)
        return None if known is None else known.attempt


# --- every node ------------------------------------------------------------------------------------------------------


class EveryEpoch(DecisionLog):
    """Accepts the decisions of deposed planners."""

    def accept(self, message: DecisionTopicMessage) -> DecisionTopicMessage | Dropped:
        if isinstance(message, EpochOpened):
            self.epoch, self.nonce = message.epoch, message.nonce
            self.planner, self.lease_s, self.left = message.planner, message.lease_s, False
        elif isinstance(message, Decision):
            self.seq = message.seq
        return message


class NothingFenced(Fences):
    """Fences no attempt."""

    def fenced(self, task_id: str, attempt: int) -> bool:
        return False


class OrderTrusted(Assembler):
    """Takes the next piece that arrives for the next piece of its sample."""

    def __init__(self) -> None:
        super().__init__()
        self.filled: dict[int, int] = {}

    def add(self, piece: Piece) -> list[Array] | Encoded | None:
        at = self.filled.pop(piece.sample, 0)
        whole = super().add(piece._replace(at=at))
        if whole is None:
            self.filled[piece.sample] = at + piece.data.nbytes
        return whole


class NeverFails:
    """An acknowledgement whose failure is overlooked."""

    def __init__(self, inner: Awaitable[Position]) -> None:
        self.inner = inner

    def __await__(self) -> Generator[Any, Any, Position | None]:
        try:
            return (yield from self.inner.__await__())
        except BusError:
            return None


class FailuresOverlooked:
    """A bus whose acknowledgements never fail."""

    def __init__(self, inner: Bus) -> None:
        self.inner = inner

    async def post(self, topic: str, value: RecordValue | None, **more: Any) -> NeverFails:
        return NeverFails(await self.inner.post(topic, value, **more))


def sender_of_one_try(bus: Bus, *arguments: Any, **more: Any) -> FrameSender:
    """A frame sender that takes each frame for acknowledged."""
    overlooking: Any = FailuresOverlooked(bus)
    return FrameSender(overlooking, *arguments, **more)


class IgnoredLease(Lease):
    """Lets a node send when it may have been declared lost."""

    async def gate(self) -> None:
        return


class StayingAwayNode(Node):
    """Does not announce itself again after it was declared lost."""

    announced: str | None = None

    async def publish(self, topic: str, message: Message, key: str) -> None:
        if isinstance(message, NodeAnnounced):
            self.announced = self.announced or message.incarnation
            if message.incarnation != self.announced:
                return
        await super().publish(topic, message, key)


class OneTryNode(Node):
    """Does not repeat a message that was not acknowledged."""

    async def publish(self, topic: str, message: Message, key: str) -> None:
        with contextlib.suppress(BusError):
            await self.bus.send(topic, messages.encode(message), key=key, partition=self.settings.region)


async def any_snapshot(bus: Bus, region: int) -> tuple[Snapshot | None, Reader]:
    """The newest snapshot, without a check against the log."""
    where = (topics.DECISIONS, region)
    async with contextlib.aclosing(snapshots.found(bus, region)) as candidates:
        async for one in candidates:
            return one.snapshot, await bus.reader([where], start={where: one.snapshot.offset + 1})
    return None, await bus.reader([where], start="start")


# --- edge and cloud --------------------------------------------------------------------------------------------------


class Watermark(SampleRanges):
    """Takes every sample below the highest finished one for finished."""

    def __init__(self) -> None:
        super().__init__()
        self.highest = -1

    def add(self, sample: int) -> None:
        super().add(sample)
        self.highest = max(self.highest, sample)

    def __contains__(self, sample: int) -> bool:
        return sample <= self.highest


class NeverHeld(Receipt):
    """Counts a record as done when it was read."""

    def hold(self) -> None:
        return


class ClosedByOne(Receipt):
    """The first release closes the record; later ones do nothing."""

    def __init__(self, still_open: dict[int, int], offset: int) -> None:
        super().__init__(still_open, offset)
        self.holds = 1

    def hold(self) -> None:
        if self.holds:
            self.holds += 1
            super().hold()

    def release(self) -> None:
        while self.holds:
            self.holds -= 1
            super().release()


class KeptPartitions(OffsetLedger):
    """Keeps the offsets of partitions that another member has got."""

    def forget(self, partitions: frozenset[TopicPartition]) -> None:
        return


class ReleasedTwice(Receipt):
    """Releases another receipt twice."""

    def __init__(self, inner: Receipt) -> None:
        self.inner = inner

    def hold(self) -> None:
        self.inner.hold()

    def release(self) -> None:
        self.inner.release()
        self.inner.release()


class TwiceReleasingFlow(Flow):
    """Releases the record of each sample twice."""

    def take_frame(self, record: Record, frame: Frame, receipt: Receipt) -> None:
        super().take_frame(record, frame, ReleasedTwice(receipt))


class RouteIgnoringFlow(Flow):
    """Takes every sample for one of the plan's first route through the edge."""

    def take_frame(self, record: Record, frame: Frame, receipt: Receipt) -> None:
        first = [cut1 < len(LAYER_S) for cut1, _ in self.plan.placement.cut_pairs].index(True)
        pieces = [piece._replace(route=first) for piece in frame.pieces]
        super().take_frame(record, frame._replace(pieces=pieces), receipt)


class LeakingFlow(Flow):
    """Does not release the records of an attempt that is over."""

    def stop(self, *, discard: bool) -> None:
        super().stop(discard=False)


class DeafHop(Hop):
    """Does not follow the decisions."""

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
        return


def believing_decode(encoded: Encoded, limit_bytes: int) -> list[Array]:
    """Decompresses whatever a sender says is a sample of one tensor of bytes."""
    content = zstandard.ZstdDecompressor().decompress(encoded.payload[1:])
    return [np.frombuffer(content, np.uint8)]


class LosingBatcher(Batcher[ModelledSample, list[Array]]):
    """Forgets every third sample that finds others waiting."""

    found_others = 0

    def submit(self, item: ModelledSample) -> asyncio.Future[Computed[list[Array]]]:
        self.found_others += self.waiting > 0
        if self.found_others == 3:
            self.found_others = 0
            return asyncio.get_running_loop().create_future()
        return super().submit(item)


class MixingBatcher(Batcher[ModelledSample, list[Array]]):
    """Gives each sample of a batch of several tasks the result of the next one."""

    def __init__(self, compute: ComputeBatch, **more: Any) -> None:
        async def mixed(batch: Sequence[ModelledSample]) -> tuple[Sequence[list[Array]], float]:
            results, busy_s = await compute(batch)
            several = len({one.plan.task_id for one in batch}) > 1
            return ([*results[1:], results[0]] if several else results), busy_s

        super().__init__(mixed, **more)


class SpreadingBatcher(Batcher[ModelledSample, list[Array]]):
    """A bad sample of a batch makes the others fail, too."""

    def __init__(self, compute: ComputeBatch, **more: Any) -> None:
        failed: set[tuple[str, int]] = set()

        async def spread(batch: Sequence[ModelledSample]) -> tuple[Sequence[list[Array]], float]:
            names = {(one.plan.task_id, one.sample) for one in batch}
            if names & failed:
                raise ModelError("toy", "another sample failed")
            try:
                return await compute(batch)
            except ModelError:
                failed.update(names)
                raise

        super().__init__(spread, **more)


class SlotKept(EdgeStage):
    """A task that is over keeps its slot."""

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        async with super().slot():
            yield
        await self.slots.acquire()


class SlotGivenTwice(EdgeStage):
    """A task that is over gives its slot back twice."""

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        async with super().slot():
            yield
        self.slots.release()


def hop(edge: type[EdgeStage] = EdgeStage, make_flow: Callable[..., Flow] = Flow, kind: type[Hop] = Hop) -> Programs:
    """Programs with these edge and cloud nodes."""

    def make(node: Node) -> Hop:
        return kind(node, edge(node.settings) if node.settings.role is Role.EDGE else CloudStage(), make_flow)

    return Programs(hop=make)


# --- the planner -----------------------------------------------------------------------------------------------------


class GivenTwice(Timeline):
    """Gives back twice what a reservation held."""

    def give(self, r: Reservation) -> None:
        super().give(r)
        super().give(r)


class ReleasedTwiceLedger(Ledger):
    """Gives the slot and the rates of a running task back to its edge twice."""

    def release(self, task_id: str, *more: Any) -> Reservation:
        r = super().release(task_id, *more)
        account = self.edges.get(r.edge or "")
        if account is not None and r.running:
            account.timeline.change(r.start_s, r.end_s, r.slots, r.link1_bps, r.link2_bps)
        return r


class Endless(QueueLimits):
    """The queue is never full."""

    def exceeded_by(self, task: Task) -> tuple[str, str] | None:
        return None


class EveryAttemptTeaches(Teacher):
    """Learns from whatever attempt is reported as complete."""

    def completed(self, task: Task, completed: TaskCompleted, now: float) -> None:
        attempt, task.attempt = task.attempt, completed.attempt
        super().completed(task, completed, now)
        task.attempt = attempt


class UnsavedLearning(PlannerCore):
    """Leaves an estimate out of its snapshots."""

    def to_state(self) -> dict[str, Any]:
        state = super().to_state()
        return {**state, "estimates": state["estimates"][1:]}


class TimelessCore(PlannerCore):
    """Asks for no tick, so that no lease expires."""

    def next_wakeup(self) -> float | None:
        return None


async def unconfirmed_reader(bus: Bus, snapshot: Snapshot) -> Reader:
    """A planner accepts a snapshot without checking it against the log."""
    where = (topics.DECISIONS, snapshot.region)
    return await bus.reader([where], start={where: snapshot.offset + 1})


class CarelessTerm(LeaderTerm):
    """Leaves garbage among the snapshots."""

    async def dead_letter_broken_snapshots(self) -> None:
        return


class InputsAhead:
    """A bus on which a decision that ends a task names one submission more than was read."""

    def __init__(self, inner: Bus) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def post(self, topic: str, value: RecordValue | None, **more: Any) -> Awaitable[Position]:
        if topic == topics.DECISIONS and value is not None:
            message = messages.decode(topic, bytes(value))
            if isinstance(message, Decision) and any(isinstance(change, Ended) for change in message.changes):
                inputs = message.inputs | {topics.TASKS: message.inputs[topics.TASKS] + 1}
                value = messages.encode(message.model_copy(update={"inputs": inputs}))
        return await self.inner.post(topic, value, **more)


def planner_with_inputs_ahead(bus: Bus, *arguments: Any, **more: Any) -> PlannerService:
    ahead: Any = InputsAhead(bus)
    return PlannerService(ahead, *arguments, **more)


HARMLESS = Canary(
    "any attempt", "a device takes results of fenced attempts", 0, programs=Programs(device=UnfencedDevice)
)
"""Not a bug in tasks: a sample's result is the same whichever attempt made it, and is delivered once. Attempts only fence.
A session numbers its frames anew in each attempt, so there it is one (`tests/unit/stages/devices/test_session.py`).
"""

FENCED_TEACHER = Canary(
    "fenced teacher", "the planner learns from fenced attempts", 1, core(teacher=EveryAttemptTeaches)
)
"""Needs a completion that is read just after a new attempt has begun: rare among random faults, so a test plays it."""

CANARIES = (
    Canary("no dedup", "a device shows every result that comes", 5, stage(missing=NeverRemoved)),
    Canary(
        "commit before publish",
        "a record counts as done when it was read",
        5,
        stage(offsets=partial(OffsetLedger, NeverHeld)),
    ),
    Canary("offsets kept", "a rebalance leaves the ledger of offsets as it was", 20, stage(offsets=KeptPartitions)),
    Canary("ignored epoch", "decisions of deposed planners count", 20, stage(decision_log=EveryEpoch)),
    Canary("ignored fences", "no attempt is ever fenced", 5, stage(fences=NothingFenced)),
    Canary("chunk order trusted", "chunks are put together as they come", 5, stage(assembler=OrderTrusted)),
    Canary("never sent again", "a failed acknowledgement is overlooked", 30, stage(frame_sender=sender_of_one_try)),
    Canary("receipts leaked", "what a fenced attempt held stays open", 5, hop(make_flow=LeakingFlow)),
    Canary(
        "route ignored", "a stage takes every sample for one of the first route", 10, hop(make_flow=RouteIgnoringFlow)
    ),
    Canary("codec bomb believed", "a sample decompresses to any size", 5, Programs(decode=believing_decode)),
    Canary("old shares after a reroute", "a running task keeps its plan", 20, Programs(device=OldSharesDevice)),
    Canary("flows kept", "a hop does not follow the decisions", 5, hop(kind=DeafHop)),
    Canary("starts forgotten", "a second attempt is not begun", 5, Programs(device=ForgetfulDevice)),
    Canary("receipt released twice", "a sample gives its records back twice", 20, hop(make_flow=TwiceReleasingFlow)),
    Canary(
        "receipt closed early",
        "the first release of a record closes it",
        5,
        stage(offsets=partial(OffsetLedger, ClosedByOne)),
    ),
    Canary(
        "reservation released twice",
        "an edge is given more back than was taken",
        20,
        core(ledger=ReleasedTwiceLedger),
    ),
    Canary(
        "timeline given twice", "a ledger's release is executed twice", 10, core(ledger=partial(Ledger, GivenTwice))
    ),
    Canary("batch loses a sample", "a sample of a batch gets no result", 30, Programs(batcher=LosingBatcher)),
    Canary("batch mixes up two tasks", "a sample gets another task's result", 30, Programs(batcher=MixingBatcher)),
    Canary("bad sample spreads", "a bad sample fails its whole batch", 30, Programs(batcher=SpreadingBatcher)),
    Canary("slot leaked", "an edge's slot is not given back", 5, hop(SlotKept)),
    Canary("slot given back twice", "an edge's slot is given back twice", 5, hop(SlotGivenTwice)),
    Canary("permit leaked", "a result does not open the window", 5, stage(window=NeverGivenBack)),
    Canary("window ignored", "a device sends without waiting for results", 5, stage(window=Boundless)),
    Canary("gate ignored", "a node goes on sending after half a lease", 30, stage(lease=IgnoredLease)),
    Canary(
        "no watchdog",
        "a device waits for results for ever",
        20,
        Programs(device=partial(Device, make_attempt=PatientAttempt)),
    ),
    Canary("no way back", "a node that was declared lost stays away", 5, Programs(node=StayingAwayNode)),
    Canary("told once", "an event that was not acknowledged is not sent again", 40, Programs(node=OneTryNode)),
    Canary("any snapshot (stage)", "a stage believes every snapshot", 40, stage(open_decisions=any_snapshot)),
    Canary(
        "any snapshot (planner)", "a planner believes every snapshot", 20, service(reader_behind=unconfirmed_reader)
    ),
    Canary("garbage left", "garbage among the snapshots stays", 5, service(leader_term=CarelessTerm)),
    Canary(
        "watermark drops a frame", "a frame that is sent again after later ones is dropped", 60, stage(done=Watermark)
    ),
    Canary(
        "frames not repeated",
        "a new attempt at a session does not repeat frames",
        10,
        Programs(device=partial(Device, make_session=ForgetfulSession)),
    ),
    Canary("queue unbounded", "a full queue takes more", 20, core(queue_limits=Endless)),
    Canary("learning unsaved", "a learned value is not in the snapshot", 5, Programs(core=UnsavedLearning)),
    Canary("losses unseen", "a silent node is not declared lost", 5, Programs(core=TimelessCore)),
    Canary(
        "inputs skipped", "a planner records more input than it read", 5, Programs(planner=planner_with_inputs_ahead)
    ),
)
"""What is planted, and how soon it must be caught."""


def canary(name: str) -> Canary:
    """The canary of this name."""
    return next(one for one in CANARIES if one.name == name)
