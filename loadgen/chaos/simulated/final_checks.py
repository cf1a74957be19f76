"""Final checks of a seed: guarantees that can only be checked at the end.

`loadgen.chaos.simulated.monitor` checks the others during the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

from bus import topics
from bus.errors import DeeparError
from bus.memory.bus import MemoryBroker
from bus.messages import HandleInput, TaskState, TaskSubmitted
from loadgen.chaos.simulated.camera import CameraRecord
from loadgen.chaos.simulated.client import SimulatedClient
from loadgen.chaos.simulated.faults import Breaker
from loadgen.chaos.simulated.oracle import Oracle, Say
from loadgen.sim.region import VirtualRegion
from planner.core.core import PlannerCore
from stages.devices.device import Device
from stages.hops.edge_stage import EdgeStage
from stages.hops.hop import Hop

ENDS_OF_PROCESSES = frozenset(("stopped", "draining", "not_ready", "closed"))
"""Causes with which the frames of a session fail when its device ends or stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalChecks:
    """The objects whose final states are compared."""

    region: VirtualRegion
    broker: MemoryBroker
    client: SimulatedClient
    cameras: CameraRecord
    oracle: Oracle
    breaker: Breaker
    bad: Container[str]  # tasks with a sample on which the model fails
    crowded: bool  # whether the planner may reject tasks because its queue is full
    say: Say

    def judge(self, *, settled: bool) -> None:
        """Run all checks; leftovers are checked only if the region has `settled`."""
        oracle, breaker, client = self.oracle, self.breaker, self.client
        for process in self.region.processes.values():
            for end in process.ends:
                self.say("G7", f"a process ended with an error: {end}")
        for task in client.tasks:
            ends = oracle.ends.get(task.task_id, [])
            whole, shown = set(range(task.samples)), client.shown(task.task_id)
            if ends and ends[0].state is TaskState.COMPLETED and shown != whole:
                self.say("G5", f"{task.task_id} completed without {sorted(whole - shown)}")
            if oracle.stalled[task.task_id] and task.task_id not in breaker.missed:
                self.say("G5", f"{task.task_id} waited for samples that were lost")
        for stage in self.region.stages.values():
            if stage.counted()["stalled_attempts"] and not breaker.missed:
                self.say("G5", f"{stage.settings.name} waited for samples that were lost")
        self._judge_sessions()
        leader = self.region.leader()
        if leader is not None:
            try:
                leader.core.validate()
            except DeeparError as error:
                self.say("G2", str(error))
            if settled and leader.core.state_hash != oracle.core.state_hash:
                self.say("G3", "the leader's state differs from the state replayed from its decisions")
            restored = PlannerCore.from_state(leader.core.to_state(), options=leader.core.options)
            if restored.state_hash != leader.core.state_hash:
                self.say("G3", "a snapshot of the leader's state restores to another state")
        if settled:
            if not all(stage.joined for stage in self.region.stages.values()):
                self.say("G1", "not all processes are back")
            self._look_for_leftovers()
            self._look_for_dead_letters()
        sessions = [task for task in self.cameras.sessions if oracle.admitted[task.task_id]]
        tasks = (*client.tasks, *sessions)
        acknowledged = (*client.acknowledged, *(task.task_id for task in sessions))
        oracle.finish(acknowledged, {task.task_id: self._excuses(task) for task in tasks})

    def _judge_sessions(self) -> None:
        """G5: every frame of a session has an answer or an error that the faults explain."""
        for task_id, number in self.cameras.unanswered:
            self.say("G5", f"{task_id}: frame {number} has neither an answer nor an error")
        for task in self.cameras.sessions:
            causes = self.cameras.causes[task.task_id]
            unexplained = causes - self._excuses(task) - ENDS_OF_PROCESSES
            if unexplained and task.task_id not in self.breaker.poisoned:
                self.say("G5", f"{task.task_id}: frames failed as {sorted(unexplained)}")
            if self.oracle.stalled[task.task_id] and task.task_id not in self.breaker.missed:
                self.say("G5", f"{task.task_id} waited for frames that were lost")

    def _excuses(self, task: TaskSubmitted) -> frozenset[str]:
        """Causes with which a task may legitimately fail."""
        causes = set()
        if task.task_id in self.breaker.poisoned:
            causes.add("any")
        if task.task_id in self.bad:
            causes.add("model")
        if task.task_id in self.breaker.cancelled:
            causes.add("cancelled")
        if task.deadline_s is not None:
            causes.add("deadline")
        if isinstance(task.input, HandleInput) and task.device in self.oracle.lost:
            causes.add("input_lost")
        if self.crowded:
            causes.add("queue_full")
        return frozenset(causes)

    def _look_for_leftovers(self) -> None:
        """G8: after every task has ended, no stage holds state of a task."""
        for stage in self.region.stages.values():
            name, work = stage.settings.name, stage.work
            if isinstance(work, Device):
                if work.tasks or work.clients:
                    self.say("G8", f"{name} still has {sorted(work.tasks)} and {sorted(work.clients)}")
            elif isinstance(work, Hop):
                if work.flows or work.buffered or work.held_bytes:
                    self.say("G8", f"{name} still has {sorted(work.flows)} and {work.buffered}")
                edge = work.stage
                if isinstance(edge, EdgeStage) and edge.slots._value != stage.settings.slots:
                    self.say("G2", f"{name} has {edge.slots._value} slots free of {stage.settings.slots}")
                if work.open_records:
                    self.say("G8", f"{name} has {work.open_records} open records")

    def _look_for_dead_letters(self) -> None:
        """G7: every garbage record is dead-lettered unless the dead letter was lost; after healing, exactly once."""
        log = self.broker.logs(topics.DEAD_LETTER)[0]
        kept = Counter(record.key or "" for record in log.read(0, 1 << 30))
        fresh = len(self.breaker.dead_letters) - self.breaker.last_dead_letters
        for index, origin in enumerate(self.breaker.dead_letters):
            if not kept[origin] and (index >= fresh or not self.breaker.lossy):
                self.say("G7", f"no dead letter of {origin}")
            elif kept[origin] > 1 and index >= fresh:
                self.say("G7", f"{kept[origin]} dead letters of {origin}")
