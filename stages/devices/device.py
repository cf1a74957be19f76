"""The device stage: runs the first layers of its tasks' models, sends activations, collects results.

At most `window` samples of a task are in the pipeline without a result. This window is the only backpressure, because
Kafka provides none. The device keeps a task's input until the task ends, so that a later attempt can send the samples
that have no result yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from bus import topics
from bus.errors import BusError, BusUnavailableError, ProtocolError, UnknownTopicError
from bus.frames import AttemptPlan, Frame, decode_frame
from bus.messages import (
    Admitted,
    Decision,
    Ended,
    LinkMeasurement,
    NodeJoined,
    NodeLost,
    Placed,
    Rerouted,
    Retried,
    Start,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskSubmitted,
)
from bus.port import Bus, Reader, Record
from bus.tensors import Array
from bus.values import Role
from stages.devices.attempt import DeviceAttempt, DeviceTask, ResultSink, RunningAttempt
from stages.devices.device_steps import device_segments
from stages.devices.requests import DeviceClient, DeviceRequest
from stages.devices.session import DeviceSession, Keep
from stages.devices.session_attempt import SessionAttempt
from stages.frame_authorization import FrameAuthorization
from stages.measuring.clock import exact_clock
from stages.measuring.peers import MAX_PROBED_EDGES, LinkToPeers, edges_to_probe
from stages.measuring.probes import Prober
from stages.measuring.reports import measurement
from stages.measuring.throughput import LinkThroughput
from stages.network.delay_line import DelayLine
from stages.network.shaper import Link
from stages.node import RETRY_S, Node

STALL_S = 30.0
STALL_SAMPLES = 10
"""The device requests another attempt after `STALL_S` plus the predicted time of ten samples without progress, while the
bus was reachable: then a record is lost for good, for example through retention.
"""
FIRST_LATENCIES_S = 1.0
"""Maximum time that a device waits for the latencies of its links before it announces itself."""
PARTITION_S = 5.0
"""Interval at which a device checks which partition carries its results."""


class Device:
    """The work of a device."""

    def __init__(
        self,
        node: Node,
        on_result: ResultSink | None = None,
        *,
        kept: Callable[[str], Iterable[int]] = lambda task_id: (),
        make_attempt: Callable[..., DeviceAttempt] = DeviceAttempt,
        make_session: Callable[..., DeviceSession] = DeviceSession,
    ) -> None:
        """`kept` returns the samples of a task whose results the sink stored before a restart of the device. The device
        skips these samples. `make_attempt` and `make_session` have the parameters of `DeviceAttempt`
        and `DeviceSession`.
        """
        self.node = node
        self._kept = kept
        self._make_attempt, self._make_session = make_attempt, make_session
        self.link1 = Link(node.settings.link1_capacity_bps, node.settings.network)
        self.authorization = FrameAuthorization(node)
        self.tasks: dict[str, DeviceTask] = {}
        self._on_result = on_result
        self._clients: dict[str, DeviceRequest | DeviceSession] = {}  # by task, until it is over
        self._submissions: dict[str, asyncio.Task[None]] = {}  # of the requests, until the bus has them
        self._group: asyncio.TaskGroup | None = None
        self._subscribed: set[Bus] = set()  # sites whose results are being read
        # One lock per site, so that an unreachable site delays only itself.
        self._subscribing: dict[Bus, asyncio.Lock] = {}
        self._draining = False
        self._throughputs: dict[str, LinkThroughput] = {}  # by edge, the one used last at the end
        self._prober: Prober | None = None
        self._used: deque[str] = deque(maxlen=MAX_PROBED_EDGES)  # edges of this device's tasks, the last one first
        if node.settings.probes:
            way = LinkToPeers(
                node.probing, self.link1, topics.activations_topic, idle=self.idle, subscribe=self.subscribe
            )
            self._prober = Prober(node.settings.name, way, node.heartbeat_now)
        self._arriving: DelayLine[Record] = DelayLine()  # records that still cross link 1, where it has a latency

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                if self.link1.network.delays:
                    group.create_task(self._arrive(), name=f"{self.node.settings.name}: link 1")
                await self._subscribe_all()
                self.node.receives(True)
                self._aim()
                if self._prober is not None:
                    group.create_task(
                        self._prober.run(self.node.incarnation), name=f"{self.node.settings.name}: probes"
                    )
                    # Else the planner would believe that a slow edge answers at once, and try it first.
                    await self._prober.measured(FIRST_LATENCIES_S)
                self.node.serving.set()
                await asyncio.Event().wait()  # also before any site is reachable
        finally:
            self._group = None
            self._subscribed.clear()
            self._fail_clients("stopped", "the device stopped", lambda client: True)

    async def _subscribe_all(self) -> None:
        """Read results at the sites of all reachable edges, or at the region's site where no edges are configured."""
        if self.node.settings.reachable_edges is None:
            await self._subscribe_at(self.node.bus)
        for edge in self.node.settings.reachable_edges or ():
            try:
                await self.subscribe(edge)
            except (BusUnavailableError, UnknownTopicError) as error:
                if self._site(edge) is self.node.bus:
                    raise
                # Tasks through other edges go on; an attempt through this edge retries.
                self.node.log.warning("site of an edge not reached yet", edge=edge, error=str(error))

    def idle(self) -> bool:
        """Whether nothing is computed or sent: no task runs, and no session has frames under way."""
        return not any(
            self._runs(task_id) and (task.task.session is None or (task.attempt is not None and task.attempt.under_way))
            for task_id, task in self.tasks.items()
        )

    def _aim(self) -> None:
        """Probe the edges that this device may use."""
        if self._prober is None:
            return
        there = set(self.node.fences.names(Role.EDGE))
        reachable = self.node.settings.reachable_edges
        edges = there if reachable is None else there & set(reachable)
        self._prober.aim(edges_to_probe(self.node.settings.name, edges, self._used))

    def _use(self, edge: str) -> None:
        """Note that a task of this device uses an edge."""
        if self._prober is not None and (not self._used or self._used[0] != edge):
            with contextlib.suppress(ValueError):
                self._used.remove(edge)
            self._used.appendleft(edge)
            self._aim()

    def links(self) -> list[LinkMeasurement]:
        """Latency and throughput of link 1 to every probed edge."""
        found = {} if self._prober is None else self._prober.latencies()
        return [measurement(1, edge, one, self._throughputs.get(edge)) for edge, one in found.items()]

    def throughput(self, edge: str) -> LinkThroughput:
        """What link 1 carries to an edge."""
        known = self._throughputs.pop(edge) if edge in self._throughputs else LinkThroughput()
        self._throughputs[edge] = known
        while len(self._throughputs) > MAX_PROBED_EDGES:
            del self._throughputs[next(iter(self._throughputs))]
        return known

    def _site(self, edge: str) -> Bus:
        return self.node.bus.beside(topics.RESULTS, topics.activations_topic(edge))

    async def subscribe(self, edge: str) -> None:
        """Read the results that come back through `edge` from now on. Raises `BusError`."""
        if (site := self._site(edge)) not in self._subscribed:
            async with self._subscribing.setdefault(site, asyncio.Lock()):
                await self._subscribe_at(site)

    async def _subscribe_at(self, site: Bus) -> None:
        if site in self._subscribed or self._group is None:
            return
        partition = await self._results_partition(site)
        reader = await site.reader([(topics.RESULTS, partition)], start="end")
        self._subscribed.add(site)
        self._group.create_task(self._receive(site, partition, reader), name=f"{self.node.settings.name}: results")

    async def _results_partition(self, site: Bus) -> int:
        return topics.partition_of(self.node.settings.name, await site.partitions(topics.RESULTS))

    async def drain(self) -> None:
        """Start no new attempts, close the sessions, and return when the running attempts have ended."""
        self._draining = True
        self._fail_clients("draining", "the device drains", lambda client: not self._runs(client.submitted.task_id))
        for client in self._clients.values():
            if isinstance(client, DeviceSession):
                client.drain()
        while any(self._runs(task_id) for task_id in self.tasks):
            await asyncio.sleep(0.05)

    def _runs(self, task_id: str) -> bool:
        """Whether an attempt at a task runs."""
        known = self.tasks.get(task_id)
        return known is not None and known.running is not None and not known.running.done()

    # --- requests and sessions of applications in this process -----------------------------------------------------------

    def submit(self, submitted: TaskSubmitted, samples: Sequence[list[Array]]) -> DeviceRequest:
        """Submit a task whose samples are the given input tensors; `submitted.input` is a `HandleInput`.

        Raises ValueError where task and samples do not match, or the task is of another device.
        """
        request = DeviceRequest(submitted, samples, lambda: self._cancel(submitted.task_id))
        self._accept(request)
        return request

    def open_session(self, submitted: TaskSubmitted, keep: Keep = Keep.ALL) -> DeviceSession:
        """Submit a session; `submitted` has its terms, a `HandleInput` and one sample. Frames may be pushed at once.

        Raises ValueError for a task without session terms, or of another device.
        """
        session = self._make_session(submitted, keep, lambda: self._cancel(submitted.task_id), self.node.status.count)
        self._accept(session)
        return session

    @property
    def clients(self) -> Mapping[str, DeviceClient]:
        """The requests and sessions whose task has not ended, by task."""
        return self._clients

    def _accept(self, client: DeviceRequest | DeviceSession) -> None:
        """Submit a client's task. Raises ValueError where it is not for this device."""
        task, name = client.submitted, self.node.settings.name
        if task.device != name:
            raise ValueError(f"task {task.task_id} is for {task.device}; this is {name}")
        if task.task_id in self._clients or task.task_id in self.tasks:
            raise ValueError(f"task {task.task_id} is known already")
        if self._group is None or self._draining:
            client.fail("not_ready", "the device does not serve now", repeatable=True)
            return
        self._clients[task.task_id] = client
        self._submissions[task.task_id] = self._spawn(self._submit(task), f"submit {task.task_id}")

    async def _submit(self, submitted: TaskSubmitted) -> None:
        await self.node.publish(topics.TASKS, submitted, submitted.task_id)
        del self._submissions[submitted.task_id]

    def _cancel(self, task_id: str) -> None:
        if (known := self.tasks.get(task_id)) is not None:
            self._stop(known)
        if self._group is not None:
            self._spawn(self._cancel_task(task_id), f"cancel {task_id}")

    async def _cancel_task(self, task_id: str) -> None:
        if task_id in self._submissions:
            await asyncio.wait((self._submissions[task_id],))  # the planner ignores the cancellation of an unknown task
        await self.node.publish(topics.TASKS, TaskCancelled(task_id=task_id), task_id)

    def _fail_clients(self, cause: str, detail: str, which: Callable[[DeviceClient], bool]) -> None:
        """End the requests and sessions that cannot be answered any more."""
        for client in [client for client in self._clients.values() if which(client)]:
            del self._clients[client.submitted.task_id]
            client.fail(cause, detail, repeatable=True)

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        assert self._group is not None
        return self._group.create_task(work, name=f"{self.node.settings.name}: {what}")

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """A function from sample number to input tensors: of an application, else of the runner.

        Raises `UnknownNameError`, `ConfigError`.
        """
        client = self._clients.get(task.task_id)
        return client.inputs if isinstance(client, DeviceRequest) else self.node.runner.open_input(task)

    async def complete(self, completed: TaskCompleted) -> None:
        """Report a task with all its results to the application and the planner."""
        if (client := self._clients.get(completed.task_id)) is not None:
            client.complete(completed)
        await self.node.publish(topics.EVENTS, completed, completed.task_id)

    # --- decisions ---------------------------------------------------------------------------------------------------

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
        """Start the attempts that the decision starts on this device and stop those that it ends."""
        name = self.node.settings.name
        started = {change.task_id for change in decision.changes if isinstance(change, Start)}
        for change in decision.changes:
            match change:
                case Placed(device=device, placement=placement) if device == name:
                    if (client := self._clients.get(change.task_id)) is not None:
                        client.place(change)
                    if placement.edge is not None:
                        self._use(placement.edge)
                    if change.task_id not in started:  # a task that starts now prepares itself
                        self._prepare_ahead(change)
                case NodeJoined(node=node) if node.role is Role.EDGE:
                    self._aim()
                    if self._prober is not None:
                        self._prober.again(node.node)
                case NodeLost():
                    self._aim()
                case Admitted(task=task) if task.device == name:
                    self._remember(task)
                case NodeJoined(node=node) if node.incarnation == self.node.incarnation:
                    for known in self.node.fences.tasks.values():
                        if known.submitted is not None and known.submitted.device == name:
                            self._remember(known.submitted)
                case Rerouted(device=device) if device == name:
                    self._reroute(change, decision.region)
                case Start(device=device) if device == name:
                    self._start(change, decision.region)
                case Retried() if change.task_id in self.tasks:
                    self._stop(self.tasks[change.task_id])
                case Ended():
                    self._end(change)
                case _:
                    pass

    def _reroute(self, change: Rerouted, region: int) -> None:
        """Let a running attempt go on under its new placement."""
        known, placed = self.tasks.get(change.task_id), self.node.fences.placed(change.task_id)
        if known is None or placed is None or not isinstance(known.attempt, DeviceAttempt):
            return
        if known.attempt.plan.attempt != change.attempt:
            return
        if (client := self._clients.get(change.task_id)) is not None:
            client.place(placed)
        if placed.placement.edge is not None:
            self._use(placed.placement.edge)
        self._prepare_ahead(placed)
        known.attempt.reroute(
            AttemptPlan.of(placed, region=region, todo=placed.samples, input_bytes=known.task.input_bytes)
        )

    def _prepare_ahead(self, placed: Placed) -> None:
        profile = next((p for p in self.node.runner.profiles() if p.model == placed.model), None)
        if profile is not None:
            for segment in device_segments(placed.placement, profile):
                self.node.prepare_ahead(placed, segment.first, segment.last)

    def _end(self, ended: Ended) -> None:
        if (known := self.tasks.pop(ended.task_id, None)) is not None:
            self._stop(known)
        if (client := self._clients.pop(ended.task_id, None)) is not None:
            client.end(ended)

    def on_lost(self) -> None:
        """Stop every attempt; the samples that have results keep them for the next one."""
        for task in self.tasks.values():
            self._stop(task)
        gone = {task_id for task_id in self.tasks if task_id not in self.node.fences.tasks}
        for task_id in gone:
            del self.tasks[task_id]  # the node missed the decision that ended it
        self._fail_clients(
            "input_lost",
            "the device missed how the task ended",
            lambda client: (task_id := client.submitted.task_id) in gone or self.node.fences.ended(task_id),
        )

    def _remember(self, task: TaskSubmitted) -> None:
        if task.task_id not in self.tasks:
            now = exact_clock()()
            self.tasks[task.task_id] = DeviceTask(task, now, set(self._kept(task.task_id)))

    def _start(self, start: Start, region: int) -> None:
        known = self.tasks.get(start.task_id)
        placed = self.node.fences.placed(start.task_id)
        if known is None or placed is None or placed.attempt != start.attempt or self._group is None or self._draining:
            return
        client = self._clients.get(start.task_id)
        if client is not None and client.abandoned:
            return  # its cancellation is on its way to the planner
        self._stop(known)
        if known.started_s is None:
            known.started_s = exact_clock()()
        todo = [sample for sample in range(known.task.samples) if sample not in known.results]
        plan = AttemptPlan.of(placed, region=region, todo=max(1, len(todo)), input_bytes=known.task.input_bytes)
        patience_s = STALL_S + STALL_SAMPLES * placed.parts.total_s / placed.samples
        if known.task.session is not None and not isinstance(client, DeviceSession):
            lost = self.fail(plan, "input_lost", "an earlier process of the device opened the session")
            self._spawn(lost, f"lost {start.task_id}")
            return
        if isinstance(client, DeviceSession):
            known.attempt = SessionAttempt(self, client, plan, patience_s)
        else:
            on_result = self._on_result if client is None else client.show
            known.attempt = self._make_attempt(self, known, plan, todo, on_result, patience_s)
        known.running = self._group.create_task(
            known.attempt.run(), name=f"{self.node.settings.name}: {start.task_id}/{start.attempt}"
        )

    def _stop(self, task: DeviceTask) -> None:
        if task.running is not None:
            task.running.cancel()
        task.running = None
        task.attempt = None
        if isinstance(client := self._clients.get(task.task.task_id), DeviceSession):
            client.interrupt()

    # --- results -----------------------------------------------------------------------------------------------------

    async def _receive(self, site: Bus, partition: int, reader: Reader) -> None:
        """Read this device's partition; follow it when the topic is recreated or gains partitions."""
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    reading = group.create_task(self._read(reader))
                    partition, following = await self._moved(site, partition)
                    reading.cancel()
            finally:
                await reader.close()
            self.node.log.warning("results moved to another partition", partition=partition)
            reader = following

    async def _moved(self, site: Bus, partition: int) -> tuple[int, Reader]:
        """Wait until another partition carries this device's results; return it with a reader from its start."""
        while True:
            await asyncio.sleep(PARTITION_S)
            with contextlib.suppress(BusError):  # bus or topic unavailable: look again later
                now = await self._results_partition(site)
                if now != partition:
                    return now, await site.reader([(topics.RESULTS, now)], start="start")

    async def _read(self, reader: Reader) -> None:
        name = self.node.settings.name
        while True:
            try:
                records = await reader.fetch()
            except BusError as error:
                self.node.log.warning("results not read; retrying", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            for record in records:
                if record.key != name:
                    continue  # belongs to another device on the same partition
                if self.link1.network.delays:
                    now_s = asyncio.get_running_loop().time()
                    self._arriving.put(record, now_s + self.link1.latency_s(now_s))
                else:
                    await self._take(record)

    async def _arrive(self) -> None:
        """Take the records that have crossed link 1."""
        while True:
            record = await self._arriving.first()
            self._arriving.pop()
            await self._take(record)

    async def _take(self, record: Record) -> None:
        """Pass a frame to the attempt that it belongs to."""
        try:
            sender = self.authorization.of(record)
            frame = decode_frame(record.value)
            if frame.kind == "echo":
                self.authorization.check_probe(sender, frame)
                if self._prober is not None:
                    self._prober.take(frame, frame.source)
                return
            attempt = self.attempt_for(frame)
            if attempt is None:
                self.node.status.count("fenced_frames")
                return
            self.authorization.check_result(sender, frame, attempt.plan)
            attempt.take(frame)
        except ProtocolError as error:
            await self.node.dead_letter(record, error)

    def attempt_for(self, frame: Frame) -> RunningAttempt | None:
        """The running attempt that a frame of results belongs to; None where its attempt is fenced or its task has ended."""
        known = self.tasks.get(frame.task_id)
        if known is None or known.attempt is None or known.attempt.plan.attempt != frame.attempt:
            return None
        return known.attempt

    async def fail(self, plan: AttemptPlan, cause: str, detail: str, *, retryable: bool = False) -> None:
        """Report to the planner that this device cannot continue the attempt."""
        message = TaskFailed(
            task_id=plan.task_id,
            attempt=plan.attempt,
            node=self.node.settings.name,
            cause=cause,
            detail=detail[:2000],
            retryable=retryable,
        )
        await self.node.publish(topics.EVENTS, message, plan.task_id)
