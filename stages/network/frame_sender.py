"""The frame sender: packs one task's samples into frames and sends them at the granted rate.

One coroutine sends the frames of a task in order; another awaits their acknowledgements in the same order. Where a link has a
latency, a third one posts the frames in between, after that latency, so that frames in flight overlap. After a failed
acknowledgement, that frame and all later ones are sent again, and receivers drop the duplicates. Small waiting samples share
a frame; large ones are cut into chunks that take a few milliseconds of link time.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bus.errors import BusError, MessageTooLargeError
from bus.frames import MAX_FRAME_BYTES, MAX_PIECES, AttemptPlan, Frame, FrameKind, encode_frame
from bus.port import Bus, Headers, Position
from bus.tensors import Activations, Encoded, Piece, bytes_in, to_pieces
from bus.values import BITS_PER_BYTE
from stages.measuring.clock import exact_clock
from stages.measuring.throughput import LinkThroughput
from stages.network.delay_line import DelayLine
from stages.network.shaper import Grant, cross, frame_bytes

MAX_DATA_BYTES = MAX_FRAME_BYTES - 4096 - MAX_PIECES * 160
"""Limit for data in one frame; the rest is reserved for the head: a plan and the descriptions of the pieces."""
MAX_DESCRIBED = 700
"""Limit for the tensors that a frame describes: neighbours of one route share a description, others have their own."""
TENSORS_BYTES = 20
"""Average head size of tensor descriptions, which some frames carry (about 40 bytes) and others do not."""
LAST_HEADS = 8
"""The last frames of a task shrink, but carry at least this many times the size of their head."""
UNKNOWN = 1 << 62
"""Number of samples to come while it is not known."""
RETRY_S = 0.2
STUCK_SAMPLES, STUCK_S = 4, 0.1
"""A link is stuck where so many samples wait while a frame has been crossing for so long; a frame should take 20 ms."""
PLAN_EVERY_S = 5.0
"""A session's frames carry its plan again after this long, for a stage that takes over or has dropped its idle flow."""


class Destination(NamedTuple):
    """Where one task's outputs go, and at what rate."""

    part: str  # the part of a task's delay that sending belongs to: link1, link2 or result
    topic: str
    key: str  # record key
    kind: FrameKind
    grants: tuple[Grant, ...]  # shares of the links that the frames cross, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderHooks:
    """What a frame sender calls while it sends."""

    gate: Callable[[], Awaitable[None]]  # returns when the node may send
    on_busy: Callable[[float, float], None]  # begin and end of a stretch of link time, on the loop's clock
    on_acknowledged: Callable[[Sequence[int]], None]  # samples that the bus now holds completely, each reported once
    throughput: LinkThroughput | None = None  # receives what the link carries while frames wait for it


@dataclass(slots=True)
class Outgoing:
    """One sample to send."""

    sample: int
    tensors: Activations
    ready_s: float  # when it was ready to send, on the loop's clock
    route: int = 0  # index of its route in the plan
    size_bytes: int = 0  # of its tensors, or of its payload

    def __post_init__(self) -> None:
        self.size_bytes = bytes_in(self.tensors)

    @property
    def count(self) -> int:
        """The number of its tensors."""
        return len(self.tensors.tensors if isinstance(self.tensors, Encoded) else self.tensors)


class _Crossed(NamedTuple):
    """One frame that has crossed its links and arrives after their latency."""

    payload: bytes
    headers: Headers
    items: list[Outgoing]  # as in `_Sent`
    begun: list[Outgoing]
    waited: bool


@dataclass(slots=True)
class _Sent:
    """One posted frame that is not acknowledged yet."""

    acknowledgement: Awaitable[Position]
    items: list[Outgoing]  # samples whose last piece is in this frame
    begun: list[Outgoing]  # samples with a piece in this frame
    waited_bytes: int  # its size if it was ready before the frame ahead of it had crossed, else 0: the link had a pause


class FrameSender:
    """Sends one task's samples to one topic. `run` must be running; `put` never waits (the task's window bounds it)."""

    def __init__(
        self,
        bus: Bus,
        plan: AttemptPlan,
        destination: Destination,
        hooks: SenderHooks,
        *,
        source: str,
        headers: Headers = (),
    ) -> None:
        """The plan (with activations only) and `headers` go with the first frame, and again with the first frame after each
        resend; a session repeats its plan. `source` is the name of the sending node.
        """
        self._bus = bus
        self._plan = plan
        self._destination = destination
        self._hooks = hooks
        self._source = source
        self._headers = headers
        self._headers_due = True
        self._plan_due = destination.kind == "activations"
        self._plan_sent_s = float("inf")  # when the plan was sent last; never in a task
        self._rate_bps = min((grant.rate_bps for grant in destination.grants), default=1 << 40)
        self._frame_bytes: dict[int, int] = {}  # data per frame, by route: all samples of a route have the same size
        self._last_bytes = 0  # lower limit for the data in a task's last frames
        self._put = 0  # samples passed to `put`
        self._to_come = UNKNOWN  # samples not passed to `put` yet
        self._totals: tuple[int, ...] = ()  # samples of each route, for the receiver
        self._totals_due = False
        self._waiting: deque[Outgoing] = deque()
        self._begun: list[Outgoing] = []  # samples in the frame being sent
        self._traced = tuple(grant for grant in destination.grants if grant.link.shares is not None)
        self._delays = any(grant.link.network.delays for grant in destination.grants)
        self._arriving: DelayLine[_Crossed] = DelayLine()  # frames in flight, where links have latencies
        self._sent: deque[_Sent] = deque()
        self._to_send = asyncio.Event()
        self._to_await = asyncio.Event()
        self._generation = 0  # number of resends so far
        self.all_posted = asyncio.Event()  # the bus has accepted every sample of the task, acknowledged or not
        self.began_s: float | None = None  # begin of the first busy interval, on the loop's clock
        self.busy_until_s = float("-inf")  # when the last frame had crossed the links
        self.busy_s = 0.0  # link time: from when frames were ready until they had crossed at the granted rates
        self._crossing_s: float | None = None  # since when a frame crosses the links
        self.granted_s = 0.0  # what the same frames take at the granted rate
        self._acknowledged_s: float | None = None  # when the last acknowledgement came; None after a failure
        self.frames = 0
        self.resent = 0
        if plan.session is None and len(plan.placement.cut_pairs) == 1:
            self.conclude(plan.todo)

    @property
    def held_bytes(self) -> int:
        """Bytes of the samples that are not acknowledged yet."""
        held = {item.sample: item for sent in (*self._sent, *self._arriving) for item in sent.begun}
        held |= {item.sample: item for item in (*self._begun, *self._waiting)}
        return sum(item.size_bytes for item in held.values())

    def put(self, outgoing: Outgoing) -> None:
        """Queue a sample for sending."""
        self._waiting.append(outgoing)
        self._put += 1
        self._to_come -= 1
        self._to_send.set()

    def conclude(self, count: int, totals: tuple[int, ...] = ()) -> None:
        """Say how many samples `put` gets in all; `totals`, those of each route, are sent with the next frame."""
        self._to_come = count - self._put
        self._totals, self._totals_due = totals, bool(totals)
        self._to_send.set()
        if self._to_come <= 0 and not (self._totals_due or self._waiting or self._begun or self._arriving):
            self.all_posted.set()

    @property
    def stuck(self) -> bool:
        """Whether samples wait for a frame that takes much longer to cross than at the granted rate."""
        since_s = self._crossing_s
        return since_s is not None and len(self._waiting) >= STUCK_SAMPLES and exact_clock()() - since_s > STUCK_S

    async def run(self) -> None:
        """Send until cancelled. Retries when the bus fails; raises where a frame is too large."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send_all())
                group.create_task(self._await_all())
                if self._delays:
                    group.create_task(self._post_all())
        finally:
            self._rest()
            for sent in self._sent:
                _forget(sent.acknowledgement)

    async def _send_all(self) -> None:
        while True:
            while not self._waiting:
                if self._totals_due:
                    self._begun = []
                    await self._send_frame((), [], exact_clock()(), self._generation)
                    continue
                self._to_send.clear()
                self._rest()
                await self._to_send.wait()
            await self._send_next(self._generation)

    def _rest(self) -> None:
        """Leave the links to other tasks until there is more to send."""
        for grant in self._traced:
            grant.rest()

    async def _send_next(self, generation: int) -> None:
        """Send the next sample in chunks, or as many small ones as wait together in one frame."""
        first = self._waiting.popleft()
        batch = [first]
        limit_bytes = self._frame_bytes.get(first.route) or self._choose(first)
        pieces = to_pieces(first.sample, first.tensors, _piece_bytes(first, limit_bytes), first.route)
        if len(pieces) == 1:
            left_bytes = self._room(first, limit_bytes) - first.size_bytes
            described = len(pieces[0].tensors)
            while self._waiting and len(pieces) < MAX_PIECES:
                following = self._waiting[0]
                left_bytes -= following.size_bytes
                if following.route != batch[-1].route:
                    described += following.count
                if left_bytes < 0 or described > MAX_DESCRIBED:
                    break
                batch.append(self._waiting.popleft())
                pieces += to_pieces(following.sample, following.tensors, limit_bytes, following.route)
        self._begun = batch
        frames = [(piece,) for piece in pieces] if len(batch) == 1 else [tuple(pieces)]
        for index, frame in enumerate(frames):
            ready_s = max([item.ready_s for item in batch])
            await self._send_frame(frame, batch if index == len(frames) - 1 else [], ready_s, generation)
            if generation != self._generation:
                return  # the whole batch was queued again
        self._begun = []

    def _room(self, first: Outgoing, limit_bytes: int) -> int:
        """How much data the next frame may carry: half of a task's last waiting samples, else a full frame.

        The next stage starts to compute a frame's samples only when the whole frame has crossed. Shrinking the last frames
        shortens the time in which that stage is idle.
        """
        guarded = any(
            grant.guarded for grant in self._destination.grants
        )  # then the guard decides when the next frame leaves
        if self._to_come or self._destination.kind != "activations" or guarded:
            return limit_bytes
        waiting_bytes = first.size_bytes + sum([item.size_bytes for item in self._waiting])
        return min(limit_bytes, max(waiting_bytes // 2, self._last_bytes))

    def _choose(self, first: Outgoing) -> int:
        """How much data a frame of this route should carry; an encoded frame without data shows the size of its head."""
        whole = to_pieces(first.sample, first.tensors, MAX_DATA_BYTES)[0]
        empty = Piece(first.sample, whole.size_bytes, whole.size_bytes, memoryview(b""))
        head = encode_frame(
            Frame(self._destination.kind, self._plan.task_id, self._plan.attempt, self._source, (empty,))
        )
        head_bytes = len(head) + TENSORS_BYTES
        self._last_bytes = LAST_HEADS * head_bytes
        size_bytes = whole.size_bytes
        if isinstance(first.tensors, Encoded):
            size_bytes += size_bytes // 4  # others are larger: room for most of them
        chosen = frame_bytes(self._rate_bps, size_bytes, MAX_DATA_BYTES, head_bytes=head_bytes)
        self._frame_bytes[first.route] = chosen
        return chosen

    async def _send_frame(
        self, pieces: tuple[Piece, ...], done: list[Outgoing], ready_s: float, generation: int
    ) -> None:
        begun = self._begun
        destination = self._destination
        clock = exact_clock()
        while True:
            plan = self._plan if self._plan_due or clock() - self._plan_sent_s >= PLAN_EVERY_S else None
            totals = self._totals if self._totals_due else ()
            payload = encode_frame(
                Frame(
                    destination.kind,
                    self._plan.task_id,
                    self._plan.attempt,
                    self._source,
                    pieces,
                    plan,
                    revision=self._plan.number,
                    totals=totals,
                )
            )
            await self._hooks.gate()  # before the link, so that frames do not burst when the gate opens
            self._crossing_s = max(ready_s, self.busy_until_s)
            crossed_s = await cross(destination.grants, len(payload), ready_s)
            self._crossing_s = None
            waited = self._crossed(ready_s, crossed_s)
            self.granted_s += len(payload) * BITS_PER_BYTE / self._rate_bps
            if self._delays:
                if generation == self._generation:
                    headers = self._headers if self._headers_due else ()
                    self._introduced(plan is not None, bool(totals))
                    latency_s = sum(grant.link.latency_s(crossed_s) for grant in destination.grants)
                    self._arriving.put(_Crossed(payload, headers, done, begun, waited), crossed_s + latency_s)
                return
            await self._hooks.gate()
            if generation != self._generation:
                return
            headers = self._headers if self._headers_due else ()
            try:
                acknowledgement = await self._bus.post(destination.topic, payload, key=destination.key, headers=headers)
                break
            except MessageTooLargeError:
                raise
            except BusError:
                await asyncio.sleep(RETRY_S)
                ready_s = clock()  # exclude the failure from link time
        if generation != self._generation:
            _forget(acknowledgement)
            return
        self._introduced(plan is not None, bool(totals))
        self._posted(_Sent(acknowledgement, done, begun, len(payload) if waited else 0))

    def _introduced(self, with_plan: bool, with_totals: bool) -> None:
        """Note that a frame is on its way that brings the headers, if they were due, and perhaps the plan and the totals."""
        self._plan_due = self._headers_due = False
        self._totals_due = self._totals_due and not with_totals
        if with_plan and self._plan.session is not None and self._destination.kind == "activations":
            self._plan_sent_s = exact_clock()()

    def _crossed(self, ready_s: float, now: float) -> bool:
        """Count the link time of a frame that was ready at `ready_s` and has crossed now; returns whether it had to wait.

        It ends here and not at the acknowledgement: the bus adds latency, during which the next frames already cross.
        """
        waited = ready_s <= self.busy_until_s
        begin_s = min(now, max(ready_s, self.busy_until_s))
        if self.began_s is None:
            self.began_s = begin_s
        self.busy_s += now - begin_s
        self.busy_until_s = now
        self._hooks.on_busy(begin_s, now)
        return waited

    def _measure(self, waited_bytes: int) -> None:
        """Count what the link carried since the last acknowledgement, if frames waited for it all the time.

        Acknowledgements show what a real link carries, too: behind the shaper, frames may queue in the bus's client.
        """
        now, since_s = exact_clock()(), self._acknowledged_s
        self._acknowledged_s = now
        if waited_bytes and since_s is not None and self._hooks.throughput is not None:
            self._hooks.throughput.carried(since_s, now, waited_bytes * BITS_PER_BYTE, self._rate_bps)

    async def _post_all(self) -> None:
        """Post frames when they arrive at the other end of the links."""
        while True:
            frame = await self._arriving.first()
            generation = self._generation
            await self._hooks.gate()
            if generation != self._generation:
                continue  # the frame is sent again
            try:
                acknowledgement = await self._bus.post(
                    self._destination.topic, frame.payload, key=self._destination.key, headers=frame.headers
                )
            except MessageTooLargeError:
                raise
            except BusError:
                await asyncio.sleep(RETRY_S)
                continue
            if generation != self._generation:
                _forget(acknowledgement)
                continue
            self._arriving.pop()
            waited_bytes = len(frame.payload) if frame.waited else 0
            self._posted(_Sent(acknowledgement, frame.items, frame.begun, waited_bytes))

    def _posted(self, sent: _Sent) -> None:
        """Note a frame that the bus has accepted; its acknowledgement comes later."""
        self.frames += 1
        self._sent.append(sent)
        self._to_await.set()
        nothing_left = self._to_come <= 0 and not (self._totals_due or self._waiting or self._arriving)
        if (sent.items or not sent.begun) and nothing_left and (not self._begun or self._begun is sent.begun):
            self.all_posted.set()

    async def _await_all(self) -> None:
        while True:
            while not self._sent:
                self._to_await.clear()
                await self._to_await.wait()
            sent = self._sent[0]
            try:
                await sent.acknowledgement
            except MessageTooLargeError:
                raise  # a retry would fail the same way
            except BusError:
                await asyncio.sleep(RETRY_S)
                self._send_again()
                continue
            self._sent.popleft()
            self._measure(sent.waited_bytes)
            if sent.items:
                self._hooks.on_acknowledged([item.sample for item in sent.items])

    def _send_again(self) -> None:
        """Queue all unacknowledged samples again, in order, each from its first piece."""
        self._generation += 1
        self._acknowledged_s = None
        again: dict[int, Outgoing] = {}
        now = exact_clock()()
        for item in [*(item for sent in (*self._sent, *self._arriving) for item in sent.begun), *self._begun]:
            item.ready_s = now  # exclude the time until the failure was noticed from link time
            again.setdefault(item.sample, item)
        for later in self._sent:
            _forget(later.acknowledgement)
        self._sent.clear()
        self._arriving.clear()
        self._begun = []
        self._waiting.extendleft(reversed(again.values()))
        self.resent += len(again)
        self._plan_due, self._headers_due = self._destination.kind == "activations", True
        self._totals_due = bool(self._totals)
        self._to_send.set()


def _piece_bytes(outgoing: Outgoing, limit_bytes: int) -> int:
    """The size of the pieces of a sample: equal ones for encoded samples, which differ from that which chose the limit."""
    if not isinstance(outgoing.tensors, Encoded):
        return limit_bytes
    return math.ceil(outgoing.size_bytes / max(1, math.ceil(outgoing.size_bytes / limit_bytes)))


def _forget(acknowledgement: Awaitable[Position]) -> None:
    """Ignore the outcome of an acknowledgement, so that a failure causes no asyncio warning."""
    if isinstance(acknowledgement, asyncio.Future):
        acknowledgement.add_done_callback(lambda done: done.cancelled() or done.exception())


@contextlib.asynccontextmanager
async def sending(sender: FrameSender) -> AsyncIterator[None]:
    """Run a frame sender while the block runs. A failure of either ends both and is raised without an exception group."""
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(sender.run())
            yield
            task.cancel()
    except BaseExceptionGroup as failures:
        first: BaseException = failures
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
