"""Planted bugs, to see that the simulation finds them: each breaks one promise in one line.

A canary gives the region other programs, or replaces one method where a role has no seam.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from bus import messages, snapshots, topics
from bus.decisions import DecisionLog, DecisionTopicMessage, Dropped
from bus.errors import BusError, ProtocolError
from bus.frames import decode_frame
from bus.messages import Decision, Ended, EpochOpened, Message, Snapshot, Start
from bus.port import Bus, Reader
from bus.tensors import Array, Assembler, Piece, to_tensors
from loadgen.sim.programs import REAL, Programs
from planner.core.placing import QueueLimits
from planner.core.records import Task
from planner.search.ledger import Ledger, Reservation, Timeline
from planner.service.leader_term import LeaderTerm
from planner.service.service import PlannerService
from stages.attempt import DeviceAttempt
from stages.device import Device
from stages.edge_stage import EdgeStage
from stages.fences import Fences
from stages.flow import Flow
from stages.frame_sender import FrameSender
from stages.hop import Hop
from stages.node import Node, Work
from stages.offsets import OffsetLedger, Receipt
from stages.runner import Station


@dataclass(frozen=True, slots=True)
class Canary:
    """One planted bug."""

    name: str
    what: str  # in words
    within: int  # seeds, counted from 0, within which it must be caught
    owner: type | ModuleType | None = None
    method: str = ""
    broken: Callable[..., Any] | None = None
    programs: Programs = REAL  # what the region's processes run; a bug of a whole role is planted here

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Replaces the method while the block runs; nothing if the bug is in `programs`."""
        if self.owner is None:
            yield
            return
        sound = self.owner.__dict__[self.method]
        setattr(self.owner, self.method, self.broken)
        try:
            yield
        finally:
            setattr(self.owner, self.method, sound)


def _no_dedup(self: DeviceAttempt, sample: int, outputs: list[Array]) -> None:
    self._missing.add(sample)
    _sound_result(self, sample, outputs)


_sound_result = DeviceAttempt._result


def _commit_before_publish(self: Receipt) -> None:
    """Nothing holds a record but its arrival."""


def _keep_offsets(self: OffsetLedger, partitions: Any) -> None:
    """What another member got is still believed to be ours."""


def _ignore_epoch(self: DecisionLog, message: DecisionTopicMessage) -> DecisionTopicMessage | Dropped:
    if isinstance(message, EpochOpened):
        self.epoch, self.nonce = message.epoch, message.nonce
        self.planner, self.lease_s, self.left = message.planner, message.lease_s, False
    elif isinstance(message, Decision):
        self.seq = message.seq
    return message


def _never_fenced(self: Fences, task_id: str, attempt: int) -> bool:
    return False


def _trust_order(self: Assembler, piece: Piece) -> list[Array] | None:
    """Whatever comes next is the next chunk."""
    tensors, buffer, filled = self._open.pop(piece.sample, (piece.tensors, bytearray(piece.size_bytes), 0))
    end = filled + piece.data.nbytes
    buffer[filled:end] = piece.data
    if end < piece.size_bytes:
        self._open[piece.sample] = (tensors, buffer, end)
        return None
    return to_tensors(tensors, memoryview(bytes(buffer[: piece.size_bytes])))


def _never_again(self: FrameSender) -> None:
    """What was not acknowledged is taken for sent."""
    self._sent.popleft()


def _hold_on(self: Flow) -> None:
    """What was let go of keeps its records open."""
    self.closed = True


def _keep_flows(self: Hop, decision: Any, fenced: Any) -> None:
    """Decisions are not followed."""


class ForgetfulDevice(Device):
    """Overlooks a start while another attempt runs."""

    def _start(self, start: Start, region: int) -> None:
        known = self.tasks.get(start.task_id)
        if known is None or known.started_s is None:
            super()._start(start, region)


def _commit_when_first_sent(self: Flow, samples: Sequence[int]) -> None:
    """What came of a sample gives its records back twice."""
    for sample in samples:
        if sample in self._receipts:
            self._receipts[sample] *= 2
    _sound_acknowledged(self, samples)


_sound_acknowledged = Flow._acknowledged


def _carelessly(self: Receipt) -> None:
    """As `_sound_release`, and nobody minds when it is done once more: the record is closed for the others, too."""
    self._holds = 1
    _sound_release(self)


_sound_release = Receipt.release


def _give_twice(self: Timeline, r: Reservation) -> None:
    """What is given back is given back again."""
    _sound_give(self, r)
    _sound_give(self, r)


_sound_give = Timeline.give


def _release_wrongly(self: Ledger, task_id: str, *more: Any) -> Reservation:
    """A task that holds nothing any more has its last slot and rates given back once more, to its edge."""
    r = _sound_ledger_release(self, task_id, *more)
    account = self.edges.get(r.edge or "")
    if account is not None and r.running:
        account.timeline.change(r.start_s, r.end_s, r.slots, r.link1_bps, r.link2_bps)
    return r


_sound_ledger_release = Ledger.release


async def _slot_kept(self: Flow) -> None:
    """A task that is over goes on holding its slot."""
    await _sound_serve(self)
    if isinstance(self.hop.stage, EdgeStage) and self.computes:
        await self.hop.stage.slots.acquire()


async def _slot_twice(self: Flow) -> None:
    """A task that is over gives its slot back twice."""
    await _sound_serve(self)
    if isinstance(self.hop.stage, EdgeStage) and self.computes:
        self.hop.stage.slots.release()


_sound_serve = Flow._serve


def _permit_kept(self: DeviceAttempt, sample: int, outputs: list[Array]) -> None:
    """A result does not open the window."""
    window, self._window = self._window, asyncio.Semaphore(0)
    try:
        _sound_result(self, sample, outputs)
    finally:
        self._window = window


async def _no_window(
    self: DeviceAttempt, inputs: Callable[[int], list[Array]], station: Station | None, sender: FrameSender | None
) -> None:
    """Every sample may be under way at once."""
    for _ in self.todo:
        self._window.release()
    await _sound_send(self, inputs, station, sender)


_sound_send = DeviceAttempt._send


class UngatedNode(Node):
    """Goes on sending when it may have been declared lost."""

    async def gate(self) -> None:
        return


async def _no_watch(self: DeviceAttempt) -> None:
    """What does not come is waited for."""


class StayingAwayNode(Node):
    """Drops its work when it is declared lost, and does not announce itself again."""

    def _rejoin(self, work: Work) -> None:
        work.on_lost()


class OneTryNode(Node):
    """Does not repeat a message that was not acknowledged."""

    async def publish(self, topic: str, message: Message, key: str) -> None:
        with contextlib.suppress(BusError):
            await self.bus.send(topic, messages.encode(message), key=key, partition=self.settings.region)


async def _any_snapshot(bus: Bus, region: int) -> tuple[Snapshot | None, Reader]:
    """The newest snapshot is believed as it stands."""
    where = (topics.DECISIONS, region)
    async with contextlib.aclosing(snapshots.found(bus, region)) as candidates:
        async for one in candidates:
            return one.snapshot, await bus.reader([where], start={where: one.snapshot.offset + 1})
    return None, await bus.reader([where], start="start")


async def unconfirmed_reader(bus: Bus, snapshot: Snapshot) -> Reader:
    """A planner accepts a snapshot without checking it against the log."""
    where = (topics.DECISIONS, snapshot.region)
    return await bus.reader([where], start={where: snapshot.offset + 1})


async def _no_letter(self: LeaderTerm) -> None:
    """Nobody looks after the snapshots."""


def _endless_queue(self: QueueLimits, task: Task) -> None:
    """The queue never looks full."""


async def _deaf(self: LeaderTerm, reader: Reader) -> None:
    """Nobody is declared lost."""


async def _inputs_early(self: LeaderTerm, changes: Any, now_s: float) -> None:
    """The records say of a task that it was read before it was."""
    if any(isinstance(change, Ended) for change in changes):
        self.context.inputs[topics.TASKS] += 1
    await _sound_decided(self, changes, now_s)


_sound_decided = LeaderTerm._publish_decision


class UnfencedDevice(Device):
    """Takes results of fenced attempts like any other."""

    async def _read(self, reader: Reader) -> None:
        while True:
            for record in await reader.fetch():
                if record.key != self.node.settings.name:
                    continue
                try:
                    frame = decode_frame(record.value)
                    known = self.tasks.get(frame.task_id)
                    if known is not None and known.attempt is not None:
                        known.attempt.take(frame)
                except ProtocolError as error:
                    await self.node.dead_letter(record, error)


HARMLESS = Canary(
    "any attempt", "a device takes results of fenced attempts", 0, programs=Programs(device=UnfencedDevice)
)
"""Not a bug: a sample's result is the same whichever attempt made it, and shows once. Attempts only fence."""

CANARIES = (
    Canary("no dedup", "a device shows every result that comes", 5, DeviceAttempt, "_result", _no_dedup),
    Canary(
        "commit before publish", "a record counts as done when it was read", 5, Receipt, "hold", _commit_before_publish
    ),
    Canary(
        "offsets kept", "a rebalance leaves the ledger of offsets as it was", 20, OffsetLedger, "forget", _keep_offsets
    ),
    Canary("ignored epoch", "decisions of deposed planners count", 20, DecisionLog, "accept", _ignore_epoch),
    Canary("ignored fences", "no attempt is ever fenced", 5, Fences, "fenced", _never_fenced),
    Canary("chunk order trusted", "chunks are put together as they come", 5, Assembler, "add", _trust_order),
    Canary("never sent again", "a failed acknowledgement is overlooked", 30, FrameSender, "_send_again", _never_again),
    Canary("receipts leaked", "what a fenced attempt held stays open", 5, Flow, "_discard", _hold_on),
    Canary("flows kept", "a hop does not follow the decisions", 5, Hop, "on_decision", _keep_flows),
    Canary("starts forgotten", "a second attempt is not begun", 5, programs=Programs(device=ForgetfulDevice)),
    Canary(
        "receipt released twice",
        "a sample gives its records back twice",
        20,
        Flow,
        "_acknowledged",
        _commit_when_first_sent,
    ),
    Canary("receipt closed early", "the first release of a record closes it", 5, Receipt, "release", _carelessly),
    Canary(
        "reservation released twice",
        "an edge is given more back than was taken",
        20,
        Ledger,
        "release",
        _release_wrongly,
    ),
    Canary("timeline given twice", "a ledger's release is executed twice", 10, Timeline, "give", _give_twice),
    Canary("slot leaked", "an edge's slot is not given back", 5, Flow, "_serve", _slot_kept),
    Canary("slot given back twice", "an edge's slot is given back twice", 5, Flow, "_serve", _slot_twice),
    Canary("permit leaked", "a result does not open the window", 5, DeviceAttempt, "_result", _permit_kept),
    Canary("window ignored", "a device sends without waiting for results", 5, DeviceAttempt, "_send", _no_window),
    Canary("gate ignored", "a node goes on sending after half a lease", 30, programs=Programs(node=UngatedNode)),
    Canary("no watchdog", "a device waits for results for ever", 20, DeviceAttempt, "_watch", _no_watch),
    Canary("no way back", "a node that was declared lost stays away", 5, programs=Programs(node=StayingAwayNode)),
    Canary("told once", "an event that was not acknowledged is not sent again", 40, programs=Programs(node=OneTryNode)),
    Canary("any snapshot (stage)", "a stage believes every snapshot", 40, snapshots, "open_decisions", _any_snapshot),
    Canary(
        "any snapshot (planner)",
        "a planner believes every snapshot",
        20,
        programs=Programs(planner=partial(PlannerService, reader_behind=unconfirmed_reader)),
    ),
    Canary(
        "garbage left", "garbage among the snapshots stays", 5, LeaderTerm, "dead_letter_broken_snapshots", _no_letter
    ),
    Canary("queue unbounded", "a full queue takes more", 20, QueueLimits, "exceeded_by", _endless_queue),
    Canary("losses unseen", "a silent node is not declared lost", 5, LeaderTerm, "_tick_when_due", _deaf),
    Canary(
        "inputs skipped",
        "a planner records more input than it read",
        5,
        LeaderTerm,
        "_publish_decision",
        _inputs_early,
    ),
)
"""What is planted, and how soon it must be caught."""
