"""Live fault campaign: injects faults into real processes under load, then checks the raw topics.

The next fault starts only after the target of the previous one works again, so each measurement has one cause. Each
device keeps a few tasks in flight until the faults are over and the requested number of samples is reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bus import messages, topics
from bus.errors import BusError, BusUnavailableError
from bus.messages import TaskSubmitted
from bus.port import Bus
from loadgen.chaos.live.expected_results import Answers
from loadgen.chaos.live.faults import Fault, FaultKind, FaultRecord, FaultTiming, Findings, Machines, Target, pick
from loadgen.chaos.live.monitor import LiveMonitor, Tally
from loadgen.chaos.live.oracle import judge
from loadgen.chaos.live.raw_topics import RawReader
from loadgen.random_streams import Streams
from loadgen.replay.task_mix import Mix, draw

JOIN_S = 120.0
"""Time limit for the planner to start and all nodes to join."""

SILENCE_S = 120.0
"""Time without a task end after the last fault, after which the remaining tasks count as stuck."""

POLL_S = 0.05
TELL_S = 10.0
"""Interval of progress messages."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignLoad:
    """The load during the faults."""

    tasks: int = 100  # minimum
    samples: int = 20_000  # minimum, spread evenly over the tasks
    in_flight: int = 4  # maximum number of unfinished tasks per device

    def of(self, device: str, seed: int, prefix: str) -> Iterator[TaskSubmitted]:
        """Generate the tasks of a device without end. The seed determines their content; `prefix` begins their names."""
        each = -(-self.samples // self.tasks)
        mix = Mix(models={"lenet": 1.0}, samples=(each, each), datasets={"lenet": "digits"})
        page = 0
        while True:
            yield from draw(mix, self.tasks, [device], Streams(seed + page), prefix=f"{prefix}-{device}-{page}")
            page += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """Load, faults and seed of one run."""

    load: CampaignLoad
    faults: tuple[Fault, ...]  # in the order of their injection
    pace: FaultTiming
    seed: int  # of the tasks and the targets


class LiveChaos:
    """One run. Tasks are submitted over `bus`; everything else is read by a bare client with these `settings`."""

    def __init__(
        self, machines: Machines, bus: Bus, settings: Mapping[str, Any], campaign: Campaign, say: Say, region: int = 0
    ) -> None:
        self.machines, self.bus, self.settings, self.region, self.say = machines, bus, settings, region, say
        self.load, self.pace, self.seed, faults = campaign.load, campaign.pace, campaign.seed, campaign.faults
        self.faults = [fault for fault in faults if machines.names(fault.target)]
        if left_out := len(faults) - len(self.faults):
            say(f"{left_out} broker faults skipped: this run does not own the broker")
        self.findings = Findings(campaign.seed)
        self.watch = LiveMonitor(machines.results(), region)
        self.acknowledged: dict[str, int] = {}  # task -> samples
        self._answers = Answers()
        self._prefix = f"chaos-{uuid.uuid4().hex[:8]}"  # unique, because the broker may hold tasks of another run
        self._faults_over = False
        self._now = asyncio.get_running_loop().time
        self._began_s = self._now()

    async def run(self) -> Findings:
        """Run the campaign. Raises `DeeparError` if the region does not start or a process ends on its own."""
        followed = [topics.DECISIONS, topics.RESULTS, topics.ACTIVATIONS_CLOUD]
        reader = RawReader(self.settings, followed, self.watch.take)
        async with _beside(reader.follow(), self.watch.tail(), self._look_after()):
            await self._gather()
            self._began_s = self._now()
            async with _beside(self._tell()), asyncio.TaskGroup() as group:
                for device in self.machines.names(Target.DEVICE):
                    group.create_task(self._feed(device), name=f"tasks for {device}")
                for fault in self.faults:
                    await asyncio.sleep(self.pace.pause_s)
                    self.findings.faults.append(record := self._aim(fault))
                    await self._break(record)
                self._faults_over = True
            await self._settle()
        self.findings.elapsed_s = self._now() - self._began_s
        await self._judge()
        return self.findings

    async def _gather(self) -> None:
        """Wait until every node has joined."""
        wanted = {name for target in (Target.DEVICE, Target.EDGE, Target.CLOUD) for name in self.machines.names(target)}
        until_s = self._now() + JOIN_S
        while missing := wanted - self.watch.fold.joined.keys():
            if self._now() > until_s:
                raise BusUnavailableError(
                    f"{', '.join(sorted(missing))} did not join within {JOIN_S:g} s",
                    remedy="see the logs of the processes; does another planner lead this region?",
                )
            await asyncio.sleep(POLL_S)
        self.say(f"{len(wanted)} nodes have joined; {len(self.faults)} faults to come")

    async def _look_after(self) -> None:
        """Raise if a process ends that was not stopped by a fault."""
        while True:
            self.machines.check()
            await asyncio.sleep(POLL_S)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            ends = len(self.watch.fold.ends)
            self.say(f"{self._at_s():6.1f} s: {self.watch.shown:,} samples shown, {ends} tasks ended")

    def _at_s(self) -> float:
        return self._now() - self._began_s

    # --- the load ----------------------------------------------------------------------------------------------------

    async def _feed(self, device: str) -> None:
        """Keep tasks of a device in flight until the faults are over and there were enough samples."""
        coming = self.load.of(device, self.seed, self._prefix)
        open_tasks: set[str] = set()
        while not (self._faults_over and sum(self.acknowledged.values()) >= self.load.samples):
            open_tasks -= self.watch.fold.ends.keys()
            if len(open_tasks) < self.load.in_flight:
                open_tasks.add(await self._submit(next(coming)))
            else:
                await asyncio.sleep(POLL_S)

    async def _submit(self, task: TaskSubmitted) -> str:
        """Submit a task until it is acknowledged; repeated submissions count as one task."""
        payload = messages.encode(task)
        self._answers.expect(task)
        while True:
            try:
                await self.bus.send(topics.TASKS, payload, key=task.task_id, partition=self.region)
                break
            except BusError:
                await asyncio.sleep(POLL_S)
        self.acknowledged[task.task_id] = task.samples
        return task.task_id

    async def _settle(self) -> None:
        """Wait until all tasks have ended, or until none ended for `SILENCE_S`."""
        ends = self.watch.fold.ends
        known, until_s = len(ends), self._now() + SILENCE_S
        while left := len(self.acknowledged.keys() - ends.keys()):
            if len(ends) > known:
                known, until_s = len(ends), self._now() + SILENCE_S
            if self._now() > until_s:
                self.say(f"{left} tasks have not ended, and no task has ended for {SILENCE_S:g} s")
                return
            await asyncio.sleep(POLL_S)

    # --- breaking ----------------------------------------------------------------------------------------------------

    def _aim(self, fault: Fault) -> FaultRecord:
        """Select the process to hit: the leader among planners, otherwise one that the seed selects."""
        leader = self.watch.fold.leader
        if fault.target is Target.PLANNER and leader in self.machines.names(Target.PLANNER):
            return FaultRecord(fault, leader, self._at_s())
        return FaultRecord(fault, pick(self.machines.names(fault.target), fault, self.seed), self._at_s())

    async def _break(self, record: FaultRecord) -> None:
        """Inject one fault, wait until its target works again, and fill in the measurements."""
        fault, name, machines = record.fault, record.name, self.machines
        began_s = self._now()
        self.say(f"{record.at_s:6.1f} s: {fault.kind} {name}")
        if fault.kind is FaultKind.STOP:
            machines.signal(name, signal.SIGSTOP)
            try:
                await asyncio.sleep(self.pace.stop_s)
            finally:
                over_s = self._now()
                seen = self.watch.await_sign(fault.target, name, over_s)
                machines.signal(name, signal.SIGCONT)
        else:
            await self._end(fault, name)
            over_s = self._now()
            seen = self.watch.await_sign(fault.target, name, over_s)
            machines.start(name)
        if fault.target is Target.BROKER:
            await machines.broker_answers()
            ready_s = self._now()
            record.ready_s = ready_s - over_s
            seen = self.watch.await_sign(fault.target, name, ready_s)
        try:
            async with asyncio.timeout(self.pace.recovery_s):
                seen_s = await seen
        except TimeoutError:
            self.say(f"{self._at_s():6.1f} s: {name} showed no work within {self.pace.recovery_s:g} s")
            return
        record.recovered_s = seen_s - over_s
        if fault.target is Target.BROKER:
            record.flow_after_ready_s = seen_s - ready_s
        elif fault.kind is FaultKind.STOP:
            record.lost_after_s = self.watch.lost_after(name, began_s)
        self.say(f"{self._at_s():6.1f} s: {name} works again, {record.recovered_s:.2f} s after")

    async def _end(self, fault: Fault, name: str) -> None:
        machines = self.machines
        if fault.kind is FaultKind.KILL:
            machines.signal(name, signal.SIGKILL)
        else:
            machines.signal(name, signal.SIGTERM)
            if await machines.gone(name, self.pace.grace_s):
                return
            machines.signal(name, signal.SIGTERM)  # the second SIGTERM ends it without waiting for running work
        if not await machines.gone(name, self.pace.recovery_s):
            self.say(f"{name} did not end and was killed")
            machines.signal(name, signal.SIGKILL)
            await machines.gone(name, self.pace.recovery_s)

    # --- judging -----------------------------------------------------------------------------------------------------

    async def _judge(self) -> None:
        """Read all topics again from the first record and judge them."""
        tally = Tally(self._answers, self.region)
        tally.look_at(self.machines.results())
        await RawReader(self.settings, [topics.DECISIONS, topics.RESULTS], tally.take).read_all()
        fold = tally.fold
        verdict = judge(fold, self.acknowledged, tally.shown, tally.results)
        kinds = Counter(fold.placements[task]["kind"] for task in self.acknowledged if task in fold.placements)
        self.findings.verdict = {
            "tasks": verdict.tasks,
            "samples": verdict.samples,
            "lost": verdict.lost,
            "visible_duplicates": verdict.visible_duplicates,
            "suppressed_duplicates": verdict.suppressed_duplicates,
            "ledger_violations": len(verdict.ledger_violations),
            "violations": list(verdict.ledger_violations[:20]),
            "ends": dict(Counter(end["state"] for task, end in fold.ends.items() if task in self.acknowledged)),
            "kinds": dict(kinds.most_common()),
            "decisions": fold.decisions,
            "ignored_decisions": fold.ignored,
            "epochs": len(fold.openers),
            "retries": dict(fold.retries),
            "wrong_results": tally.wrong,
            "unreadable_frames": tally.unreadable,
        }


@contextlib.asynccontextmanager
async def _beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run these while the block runs; an error in one of them ends the block."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
