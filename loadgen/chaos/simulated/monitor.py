"""Runtime monitor of a simulated region: checks every record, every commit and every step of a stage.

* A node whose last acknowledged heartbeat is older than half a lease sends no frames (G9).
* A stage commits an offset only after every sample that completed before it was sent on or fenced (G5, G6).
* The memory that a stage holds stays within the bound that it publishes (G8).
* A device that has read a reroute starts samples under the new plan only (G2).
* A silent node is declared lost and its tasks are retried in time; a node with recent heartbeats is not (G9).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping

from bus import messages, topics
from bus.errors import ProtocolError
from bus.memory.bus import MemoryBroker
from bus.memory.partition_log import PartitionLog
from bus.messages import Decision, EpochOpened, NodeAnnounced, NodeHeartbeat, NodeJoined, NodeLost
from bus.port import Record, RecordValue, TopicPartition
from bus.values import Role
from loadgen.chaos.simulated.log_scan import Scan, Tap
from loadgen.chaos.simulated.oracle import Oracle, Say
from loadgen.chaos.simulated.region import CUT_BYTES, LEASE_S
from loadgen.sim.region import VirtualStage
from stages.devices.attempt import DeviceAttempt
from stages.devices.device import Device
from stages.hops.flow import Flow
from stages.hops.hop import ORPHAN_BYTES, Hop
from stages.membership.fences import revision_of

STAGE_S = 1.0
"""Tolerance: the time of the slowest station for one sample plus the planner's reading time."""
QUIET_S = 1.0
"""Silence after which the leader counts as absent and leases restart; a live leader writes five times in two seconds."""

_UNGATED = re.compile(b"report|probe|echo")
"""Kinds of frames that a node may send without a recent heartbeat."""
ORPHANS_HERE_BYTES = 256 << 10
"""Allowance for frames that wait for their plan in such a small region."""


class SimulatedMonitor:
    """Monitors the region of one seed and reports violations to `say`."""

    def __init__(
        self, broker: MemoryBroker, say: Say, oracle: Oracle, exempt: Callable[[str], bool], forged: Mapping[str, int]
    ) -> None:
        self.broker = broker
        self.oracle = oracle
        self.silences: list[float] = []
        """Seconds from a node's last heartbeat to its loss, excluding planner downtime."""
        self.on_decision: Callable[[Decision], None] = lambda decision: None
        self.peaks: dict[str, int] = {}  # maximum samples in a task's window, by role
        self._say = say
        self._exempt = exempt  # tasks for which samples need not be preserved, e.g. poisoned ones
        self._forged = forged  # task -> samples that a fault wrote beside its own, which no window lets wait
        self._heard: dict[str, float] = {}  # node -> send time of its last acknowledged heartbeat
        self._beats: dict[str, float] = {}  # incarnation -> when its last heartbeat was written
        self._members: dict[str, str] = {}  # node -> incarnation, according to the decisions
        self._spoke_s = float("-inf")  # when the leader last wrote
        self._up_s = float("-inf")  # start of the leader's current uninterrupted activity
        self._scans: dict[TopicPartition, Scan] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._seen: dict[Flow, int] = {}
        self._counted: dict[str, list[tuple[Flow, int]]] = {}  # stage -> samples per flow at the last memory check
        self._begun: dict[tuple[str, str, int, int], int] = {}  # samples begun when a reroute had been read, by plan
        self._said: set[tuple[str, ...]] = set()

    def begin(self) -> None:
        """Start following the control topics, which must exist."""
        for topic, read in ((topics.DECISIONS, self._read_decision), (topics.EVENTS, self._read_sign)):
            Tap(self.broker.logs(topic)[0], read)
        Tap(self.broker.logs(topics.NODES)[0], self._read_sign)

    # --- actions of processes -----------------------------------------------------------------------------------------

    def heard(self, name: str, sent_s: float) -> None:
        """Record that the bus acknowledged a heartbeat that `name` sent at `sent_s`."""
        self._heard[name] = max(sent_s, self._heard.get(name, sent_s))

    def born(self, name: str) -> None:
        """Record that a new process of `name` started; it has sent no heartbeat yet."""
        self._heard.pop(name, None)

    def sends(self, name: str, topic: str, value: RecordValue | None) -> None:
        """Check a record that a process sends: activations and results require a recent heartbeat, other frames do not."""
        if topic != topics.RESULTS and not topic.startswith("deepar.activations."):
            return
        if _UNGATED.search(value or b"", 0, 24):
            return
        silent_s = asyncio.get_running_loop().time() - self._heard.get(name, float("-inf"))
        if silent_s > LEASE_S / 2 + 1e-6:
            self._once("G9", f"{name} sends although its last heartbeat is {silent_s:.2f} s old", name)

    def commits(self, name: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Check a commit: samples that completed before these offsets must have been sent on."""
        cloud = all(topic == topics.ACTIVATIONS_CLOUD for topic, _ in offsets)
        onward = [topics.RESULTS] if cloud else [topics.ACTIVATIONS_CLOUD, topics.RESULTS]
        downstream = [self._scan(log) for topic in onward for log in self.broker.logs(topic)]
        for partition, offset in offsets.items():
            scan = self._scan(self.broker.logs(partition[0])[partition[1]])
            before = self._committed.get(partition, 0)
            self._committed[partition] = max(before, offset)
            for at, sample in scan.between(before, offset):
                if any(sample in other.whole for other in downstream):
                    continue
                task_id, attempt, revision, number = sample
                if self._exempt(task_id) or self.oracle.superseded(task_id, attempt, revision):
                    continue
                self._once(
                    "G6",
                    f"{name} commits {partition[0]}/{partition[1]}/{at}, but {task_id}/{number} was not sent on",
                    task_id,
                )

    def weigh(self, stage: VirtualStage) -> None:
        """Check the memory that a stage holds now (G8)."""
        work = stage.work
        if isinstance(work, Hop):
            counts = [(flow, flow.under_way) for flow in work.flows.values() if not flow.closed]
            # Memory is allocated for whole samples, so it is unchanged while the sample counts are.
            if counts and counts != self._counted.get(stage.settings.name):
                self._counted[stage.settings.name] = counts
                self._weigh_hop(stage, work, counts)
        elif isinstance(work, Device):
            for task in work.tasks.values():
                if task.attempt is not None:
                    self._peak(stage, task.task.task_id, task.attempt.under_way, task.attempt.window)
                if isinstance(task.attempt, DeviceAttempt):
                    self._follow_reroutes(stage, task.attempt)

    def _follow_reroutes(self, stage: VirtualStage, attempt: DeviceAttempt) -> None:
        """Check that a device which has read a reroute starts no more samples under the plan before."""
        plan, node = attempt.plan, stage.node
        placed = None if node is None else node.fences.placed(plan.task_id)
        if placed is None or placed.attempt != plan.attempt or revision_of(placed) == plan.number:
            return
        key = (stage.settings.name, plan.task_id, plan.attempt, plan.number)
        if attempt.begun > self._begun.setdefault(key, attempt.begun):
            name = stage.settings.name
            self._once("G2", f"{name} starts samples of {plan.task_id} under a plan that was replaced", name)

    def _weigh_hop(self, stage: VirtualStage, hop: Hop, counts: list[tuple[Flow, int]]) -> None:
        name, more_bytes = stage.settings.name, ORPHANS_HERE_BYTES - ORPHAN_BYTES
        for flow, count in counts:
            allowed = flow.window + self._again(flow) + self._forged.get(flow.plan.task_id, 0)
            more_bytes += max(0, count - flow.window) * 2 * max(CUT_BYTES)
            under_way = count - self._sent_on(stage, flow) if count > allowed else count
            self._peak(stage, flow.plan.task_id, under_way, allowed)
        if hop.held_bytes > hop.bound_bytes + more_bytes:
            self._once("G8", f"{name} holds {hop.held_bytes:,} of {hop.bound_bytes + more_bytes:,} bytes", name)

    def _again(self, flow: Flow) -> int:
        """Samples that preceded a flow that was reopened after a restart or a rebalance."""
        if flow not in self._seen:
            key = (flow.plan.task_id, flow.plan.attempt)
            scans = [self._scan(self.broker.logs(topic)[number]) for topic, number in flow.partitions]
            found = {entry[1] for scan in scans for entry in scan.between(0, 1 << 62) if entry[1][:2] == key}
            self._seen[flow] = len(found)
        return self._seen[flow]

    def _sent_on(self, stage: VirtualStage, flow: Flow) -> int:
        """Samples already sent on but not yet acknowledged; a result may arrive before the acknowledgement."""
        topic_names = [topics.RESULTS] + ([topics.ACTIVATIONS_CLOUD] if stage.settings.role is Role.EDGE else [])
        whole = [self._scan(log).whole for topic in topic_names for log in self.broker.logs(topic)]
        task_id, attempt = flow.plan.task_id, flow.plan.attempt
        number = flow.plan.number
        return sum(any((task_id, attempt, number, sample) in one for one in whole) for sample in flow.whole_samples)

    def _peak(self, stage: VirtualStage, task_id: str, under_way: int, window: int) -> None:
        role = stage.settings.role.value
        if under_way > self.peaks.get(role, 0):
            self.peaks[role] = under_way
        if under_way > window:
            self._once(
                "G8",
                f"{stage.settings.name} holds {under_way} samples of {task_id}, the window is {window}",
                stage.settings.name,
            )

    # --- records ----------------------------------------------------------------------------------

    def _read_sign(self, record: Record) -> None:
        try:
            message = messages.decode(record.topic, record.value)
        except ProtocolError:
            return
        if isinstance(message, NodeHeartbeat | NodeAnnounced):
            self._beats[message.incarnation] = asyncio.get_running_loop().time()

    def _read_decision(self, record: Record) -> None:
        now = asyncio.get_running_loop().time()
        message = self.oracle.take(record)
        if message is None:
            return
        if now - self._spoke_s > QUIET_S or isinstance(message, EpochOpened):
            self._up_s = now
        self._spoke_s = now
        if isinstance(message, Decision):
            for change in message.changes:
                match change:
                    case NodeJoined(node=node):
                        self._members[node.node] = node.incarnation
                        self._beats.setdefault(node.incarnation, now)
                    case NodeLost():
                        self._members.pop(change.node, None)
                        if change.cause == "lease_expired":
                            self._lost(change, now)
                    case _:
                        pass
            self.on_decision(message)
        for name, incarnation in self._members.items():
            if self._silent_s(incarnation, now) > LEASE_S + STAGE_S:
                self._once(
                    "G9", f"{name} has been silent for longer than a lease, and is not declared lost", incarnation
                )

    def _silent_s(self, incarnation: str, now: float) -> float:
        """Seconds since the incarnation's last heartbeat, or since the leader became active if that is later."""
        return now - max(self._beats[incarnation], self._up_s)

    def _lost(self, change: NodeLost, now: float) -> None:
        self.silences.append(self._silent_s(change.incarnation, now))
        if self.silences[-1] > LEASE_S + STAGE_S:
            self._once("G9", f"{change.node} is declared lost after {self.silences[-1]:.2f} s", change.incarnation)
        heard_s = now - self._beats[change.incarnation]
        # Heartbeats of the last moment may still be in transit to the planner.
        if STAGE_S / 2 < heard_s < LEASE_S - STAGE_S and self._up_s <= now - LEASE_S:
            self._once("G9", f"{change.node} is declared lost though it was heard", change.incarnation)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _scan(self, log: PartitionLog) -> Scan:
        scan = self._scans.get(log.tp)
        if scan is None:
            scan = self._scans[log.tp] = Scan(log)
        scan.go_on()
        return scan

    def _once(self, guarantee: str, what: str, *about: str) -> None:
        """Report a violation once per guarantee and subject."""
        if (guarantee, *about) not in self._said:
            self._said.add((guarantee, *about))
            self._say(guarantee, what)
