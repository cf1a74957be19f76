"""What a device does: run the front of its tasks' models, send activations, collect results.

At most `window` samples of a task are under way without a result, and results open the window: that is the backpressure of
the whole pipeline, since Kafka carries none. The device keeps a task's input until its end, so that another attempt can
send the samples that have no result yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from bus import topics
from bus.errors import BusError, BusUnavailableError, ConfigError, DeeparError, ProtocolError, UnknownTopicError
from bus.frames import Frame, Plan, decode_frame
from bus.messages import Admitted, Decision, Ended, NodeJoined, Retried, Start, TaskCompleted, TaskFailed, TaskSubmitted
from bus.port import Bus, Reader
from bus.tensors import Array, Assembler
from bus.values import ModelProfile, Parts
from stages.node import RETRY_S, Node, cause_of
from stages.outlet import Outgoing, Outlet, sending
from stages.runner import Station
from stages.shaper import Link
from stages.window import window_samples

REPORTS_S = 1.0
"""How long to wait for what the other stages measured, after the last result."""

STALL_S = 30.0
STALL_SAMPLES = 10
"""Nothing sent and no result for `STALL_S` and ten samples' predicted time, while the bus was there: something was lost
that nobody will send again (a record that fell out of retention, say), so the device asks for another attempt."""


class StalledError(DeeparError):
    """A task's results stay away for no reason that the device can see."""


class ResultSink(Protocol):
    """Where the results of a device's tasks go; every (task, sample) comes once."""

    def __call__(self, task: TaskSubmitted, sample: int, outputs: list[Array]) -> None: ...


@dataclass(slots=True)
class DeviceTask:
    """One task of this device, across its attempts."""

    task: TaskSubmitted
    admitted_s: float  # when this device read of it, its clock
    results: set[int] = field(default_factory=set)  # samples whose result is there
    started_s: float | None = None  # when the first attempt began
    running: asyncio.Task[None] | None = None
    attempt: Attempt | None = None


class Device:
    """The work of a device."""

    def __init__(
        self,
        node: Node,
        on_result: ResultSink | None = None,
        *,
        kept: Callable[[str], Iterable[int]] = lambda task_id: (),
    ) -> None:
        """`kept` tells the samples of a task whose results outlived the device's last process, where a sink keeps them:
        they are neither computed nor shown again.
        """
        self.node = node
        self._kept = kept
        self.link1 = Link(node.settings.link1_capacity_bps)
        self.tasks: dict[str, DeviceTask] = {}
        self._on_result = on_result
        self._group: asyncio.TaskGroup | None = None
        self._heard: set[Bus] = set()  # the sites whose results are read
        self._hearing: dict[Bus, asyncio.Lock] = {}  # one for each: a site that is away holds up no other
        self._draining = False

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._hear_all()
                self.node.status.receiving = True
                self.node.serving.set()
                await asyncio.Event().wait()  # also while nobody is heard yet
        finally:
            self._group = None
            self._heard.clear()

    async def _hear_all(self) -> None:
        """Listen at the sites of the edges that this device is told of; at the region's where it is told of none."""
        if self.node.settings.reachable_edges is None:
            await self._hear_at(self.node.bus)
        for edge in self.node.settings.reachable_edges or ():
            try:
                await self.hear(edge)
            except (BusUnavailableError, UnknownTopicError) as error:
                if self._site(edge) is self.node.bus:
                    raise
                # Tasks through other edges need not wait for it; one through this edge tries again.
                self.node.log.warning("an edge's site is not there yet", edge=edge, error=str(error))

    def _site(self, edge: str) -> Bus:
        return self.node.bus.beside(topics.RESULTS, topics.activations_topic(edge))

    async def hear(self, edge: str) -> None:
        """See to it that what comes back through `edge` from now on is read. Raises `BusError`."""
        if (site := self._site(edge)) not in self._heard:
            async with self._hearing.setdefault(site, asyncio.Lock()):
                await self._hear_at(site)

    async def _hear_at(self, site: Bus) -> None:
        if site in self._heard or self._group is None:
            return
        name = self.node.settings.name
        partition = topics.partition_of(name, await site.partitions(topics.RESULTS))
        reader = await site.reader([(topics.RESULTS, partition)], start="end")
        self._heard.add(site)
        self._group.create_task(self._receive(reader), name=f"{name}: results")

    async def drain(self) -> None:
        """Start nothing new and return when what runs here has ended."""
        self._draining = True
        while any(task.running and not task.running.done() for task in self.tasks.values()):
            await asyncio.sleep(0.05)

    # --- decisions ---------------------------------------------------------------------------------------------------

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
        """Begin what was started for this device, and let go of what was fenced."""
        name = self.node.settings.name
        for change in decision.changes:
            match change:
                case Admitted(task=task) if task.device == name:
                    self._remember(task)
                case NodeJoined(node=node) if node.incarnation == self.node.incarnation:
                    for task in self.node.fences.tasks.values():
                        if task.device == name:
                            self._remember(task)
                case Start(device=device) if device == name:
                    self._start(change, decision.region)
                case Retried() if change.task_id in self.tasks:
                    self._stop(self.tasks[change.task_id])
                case Ended() if change.task_id in self.tasks:
                    self._stop(self.tasks.pop(change.task_id))
                case _:
                    pass

    def on_lost(self) -> None:
        """Stop every attempt; the samples that have results keep them for the next one."""
        for task in self.tasks.values():
            self._stop(task)

    def _remember(self, task: TaskSubmitted) -> None:
        if task.task_id not in self.tasks:
            now = asyncio.get_running_loop().time()
            self.tasks[task.task_id] = DeviceTask(task, now, set(self._kept(task.task_id)))

    def _start(self, start: Start, region: int) -> None:
        known = self.tasks.get(start.task_id)
        placed = self.node.fences.placed.get(start.task_id)
        if known is None or placed is None or placed.attempt != start.attempt or self._group is None or self._draining:
            return
        self._stop(known)
        if known.started_s is None:
            known.started_s = asyncio.get_running_loop().time()
        todo = [sample for sample in range(known.task.samples) if sample not in known.results]
        plan = Plan.of(placed, region=region, todo=max(1, len(todo)), input_bytes=known.task.input_bytes)
        patience_s = STALL_S + STALL_SAMPLES * placed.parts.total_s / placed.samples
        known.attempt = Attempt(self, known, plan, todo, self._on_result, patience_s)
        known.running = self._group.create_task(
            known.attempt.run(), name=f"{self.node.settings.name}: {start.task_id}/{start.attempt}"
        )

    def _stop(self, task: DeviceTask) -> None:
        if task.running is not None:
            task.running.cancel()
        task.running = None
        task.attempt = None

    # --- results -----------------------------------------------------------------------------------------------------

    async def _receive(self, reader: Reader) -> None:
        try:
            await self._read(reader)
        finally:
            await reader.close()

    async def _read(self, reader: Reader) -> None:
        name = self.node.settings.name
        while True:
            try:
                records = await reader.fetch()
            except BusError as error:
                self.node.log.warning("cannot read results, trying again", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            for record in records:
                if record.key != name:
                    continue  # another device's, on the same partition
                try:
                    frame = decode_frame(record.value)
                    known = self.tasks.get(frame.task_id)
                    if known is None or known.attempt is None or known.attempt.plan.attempt != frame.attempt:
                        self.node.status.count("fenced_frames")
                        continue
                    known.attempt.take(frame)
                except ProtocolError as error:
                    await self.node.bury(record, error)

    async def fail(self, plan: Plan, cause: str, detail: str, *, retryable: bool = False) -> None:
        """Tell the planner that this device cannot go on with a task."""
        message = TaskFailed(
            task_id=plan.task_id,
            attempt=plan.attempt,
            node=self.node.settings.name,
            cause=cause,
            detail=detail[:2000],
            retryable=retryable,
        )
        await self.node.tell(topics.EVENTS, message, plan.task_id)


class Attempt:
    """One attempt at one task: the samples in `todo` go out, their results come in."""

    def __init__(
        self,
        device: Device,
        known: DeviceTask,
        plan: Plan,
        todo: list[int],
        on_result: ResultSink | None,
        patience_s: float,
    ) -> None:
        self.device = device
        self.known = known
        self.plan = plan
        self.todo = todo
        self.device_s = 0.0
        self._began_s: float | None = None  # when it first computed here
        self._computed_s = float("-inf")  # when it last did
        self.reports: dict[str, float] = {}
        self._on_result = on_result
        self._missing = set(todo)
        self._assembler = Assembler()
        self._window = asyncio.Semaphore(0)  # opened once sending can begin
        self._opened_s: deque[float] = deque()  # when each place of it that is free was opened
        self.window = 0  # its size, in samples
        self.under_way = 0  # samples that were begun and have no result
        self._complete = asyncio.Event()
        self._reported = asyncio.Event()
        self._last_result_s = asyncio.get_running_loop().time()
        self._moved_s = self._last_result_s  # when anything was last sent, or came back
        self._patience_s = patience_s
        self._broken: Exception | None = None

    async def run(self) -> None:
        """Send everything, wait for every result, tell the planner."""
        node = self.device.node
        try:
            if self.todo:
                await self._serve()
            await self._finish()
        except StalledError as error:
            node.log.warning("no results; asking for another attempt", task=self.plan.task_id, error=str(error))
            node.status.count("stalled_attempts")
            await self.device.fail(self.plan, "stalled", str(error), retryable=True)
        except Exception as error:
            cause = cause_of(error)
            node.log.error("a task cannot go on", task=self.plan.task_id, cause=cause, error=str(error))
            if not isinstance(error, DeeparError):
                node.log.exception("a task broke", task=self.plan.task_id)
            await self.device.fail(self.plan, cause, f"{type(error).__name__}: {error}")

    async def _serve(self) -> None:
        node, plan = self.device.node, self.plan
        cut1 = plan.placement.cut1
        inputs = node.runner.open_input(self.known.task)
        self.window = window_samples(plan.execution, self._profile().cut_bytes)
        async with contextlib.AsyncExitStack() as stack:
            station: Station | None = None
            stack.callback(self._told, None)
            if cut1:
                await node.runner.prepare(plan, 0, cut1)
                station = node.runner.station(plan, 0, cut1)
                stack.callback(station.close)
            if plan.placement.edge is None:
                await self._send(inputs, station, None)
                return
            outlet = self._outlet()
            stack.callback(self._told, outlet)
            self._moved_s = asyncio.get_running_loop().time()
            watch = asyncio.create_task(self._watch(), name=f"{node.settings.name}: watch {plan.task_id}")
            stack.push_async_callback(_cancelled, watch)
            await self._hear(plan.placement.edge)
            async with sending(outlet):
                await self._send(inputs, station, outlet)
            self.reports["link1_s"] = outlet.busy_s

    async def _hear(self, edge: str) -> None:
        """Nothing is sent before its results can be heard."""
        while True:
            try:
                await self.device.hear(edge)
                return
            except BusError as error:
                self.device.node.log.warning("cannot read results, trying again", edge=edge, error=str(error))
                await asyncio.sleep(RETRY_S)
            if self._broken:
                raise self._broken

    async def _send(self, inputs: Callable[[int], list[Array]], station: Station | None, outlet: Outlet | None) -> None:
        """Every sample, as the window opens; returns when every result is there."""
        node, plan = self.device.node, self.plan
        clock = asyncio.get_running_loop().time
        for _ in range(
            self.window
        ):  # only now: what came before, preparing the model say, is no part of a sample's time
            self._open()
        for sample in self.todo:
            await self._window.acquire()
            if self._broken:
                raise self._broken
            self.under_way += 1
            ready_s = self._opened_s.popleft()  # not now: a device that comes round to it late is not slower for that
            tensors = inputs(sample)
            if station is not None:
                tensors = await station.run(sample, tensors, ready_s)
                now = clock()
                begin_s = max(ready_s, self._computed_s)
                self._began_s, self._computed_s = begin_s if self._began_s is None else self._began_s, now
                self.device_s += now - begin_s
                node.busy("device_s", plan.task_id, begin_s, now)
                ready_s = now
            if outlet is None:
                self._result(sample, tensors)
            else:
                self._moved_s = ready_s
                outlet.put(Outgoing(sample, tensors, ready_s))
        await self._complete.wait()
        if self._broken:
            raise self._broken

    def _told(self, outlet: Outlet | None) -> None:
        """What was done here, for traces: computing, or with `outlet` sending."""
        if outlet is None:
            self.device.node.span("device", self.plan, self._began_s, self._computed_s, self.device_s)
        else:
            self.device.node.span("link1", self.plan, outlet.began_s, outlet.busy_until_s, outlet.busy_s)

    def _sent(self, samples: Sequence[int]) -> None:
        self._moved_s = asyncio.get_running_loop().time()

    async def _watch(self) -> None:
        """Break the attempt off when it stands still for longer than anything explains."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._patience_s / 4)
            if not self.device.node.alive:
                self._moved_s = clock()  # no bus, no results
            elif clock() - self._moved_s > self._patience_s:
                self._break(StalledError(f"{len(self._missing)} samples without a result for {self._patience_s:.0f} s"))
                return

    def _open(self) -> None:
        """One sample more may be under way from now on."""
        self._opened_s.append(asyncio.get_running_loop().time())
        self._window.release()

    def _break(self, error: Exception) -> None:
        self._broken = error
        self._complete.set()
        self._window.release()

    def _outlet(self) -> Outlet:
        placement = self.plan.placement
        assert placement.edge is not None
        return Outlet(
            self.device.node.bus,
            topic=topics.activations_topic(placement.edge),
            key=self.plan.task_id,
            source=self.device.node.settings.name,
            kind="activations",
            plan=self.plan,
            grants=(self.device.link1.grant(placement.link1_bps),),
            gate=self.device.node.gate,
            on_busy=partial(self.device.node.busy, "link1_s", self.plan.task_id),
            on_acknowledged=self._sent,
            headers=self.device.node.trace_header("link1", self.plan),
        )

    # --- results -----------------------------------------------------------------------------------------------------

    def take(self, frame: Frame) -> None:
        """A frame of results, or a report. Raises `ProtocolError` for one that this attempt cannot use."""
        if frame.kind == "report":
            for part, busy_s in frame.report.items():
                self.reports[part] = self.reports.get(part, 0.0) + busy_s
            if self._expected() <= self.reports.keys():
                self._reported.set()
            return
        if frame.kind != "result":
            raise ProtocolError("undecodable", f"a frame of kind {frame.kind} is not for a device")
        for piece in frame.pieces:
            try:
                whole = self._assembler.add(piece)
            except ProtocolError as error:
                if error.cause == "missing_chunk":
                    continue  # its sender sends the sample again
                self._break(error)
                raise
            if whole is not None:
                self._result(piece.sample, whole)

    def _result(self, sample: int, outputs: list[Array]) -> None:
        if sample not in self._missing:
            self.device.node.status.count("duplicates_suppressed")
            return
        self._missing.discard(sample)
        self.under_way -= 1
        self.known.results.add(sample)
        self._last_result_s = self._moved_s = asyncio.get_running_loop().time()
        self._open()
        if self._on_result is not None:
            try:
                self._on_result(self.known.task, sample, outputs)
            except Exception as error:  # a full disk, say: this task's trouble, not the device's
                self._break(error)
        if not self._missing:
            self._complete.set()

    async def _finish(self) -> None:
        if self._expected():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORTS_S):
                    await self._reported.wait()
        known, node = self.known, self.device.node
        started_s = known.started_s if known.started_s is not None else known.admitted_s
        measured = Parts(
            device_s=self.device_s,
            link1_s=self.reports.get("link1_s", 0.0),
            edge_s=self.reports.get("edge_s", 0.0),
            link2_s=self.reports.get("link2_s", 0.0),
            cloud_s=self.reports.get("cloud_s", 0.0),
            result_s=self.reports.get("result_s", 0.0),
        )
        message = TaskCompleted(
            task_id=self.plan.task_id,
            attempt=self.plan.attempt,
            node=node.settings.name,
            measured=measured,
            delay_s=max(0.0, self._last_result_s - started_s),
            wait_s=max(0.0, started_s - known.admitted_s),
        )
        await node.tell(topics.EVENTS, message, self.plan.task_id)

    def _expected(self) -> set[str]:
        """The parts that other stages report."""
        placement = self.plan.placement
        parts: set[str] = set()
        if placement.uses_slot:
            parts.add("edge_s")
        if placement.uses_cloud:
            parts |= {"link2_s", "cloud_s"}
        if placement.edge is not None:
            parts.add("result_s")
        return parts

    def _profile(self) -> ModelProfile:
        for profile in self.device.node.runner.profiles():
            if profile.model == self.plan.model:
                return profile
        raise ConfigError(f"this device has no model {self.plan.model!r}")


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
