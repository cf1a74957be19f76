"""The modelled machines of the region under test: they check what they compute, and what they return can be checked.

The content of a tensor depends on its task and sample. Thus a sample that gets the result of another one is noticed by the
next machine, or by the client.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from bus.codecs.coding import encode_sample
from bus.errors import ModelError
from bus.frames import AttemptPlan
from bus.messages import TaskSubmitted
from bus.tensors import Array, Encoded
from bus.values import BatchSpeed, Codec, CodecProfile
from loadgen.chaos.simulated.oracle import Say
from loadgen.chaos.simulated.region import (
    CUT_BYTES,
    LAYER_S,
    SPEED,
    content,
    frame_content,
    frame_number,
    same,
    same_frame,
)
from loadgen.sim.process import Process, running_process
from loadgen.sim.programs import Programs
from loadgen.sim.region import toy_profile
from stages.membership.settings import NodeSettings
from stages.runner import Coder, ModelledBatcher, ModelledRunner, ModelledSample, PaceClock, Station

CODECS = tuple(
    CodecProfile(position=position, codec=Codec.ZSTD, bytes=CUT_BYTES[position] // 2, encode_s=0.002, decode_s=0.001)
    for position in range(len(LAYER_S))
)
"""What profiles say of a lossless codec. The content is hardly smaller when encoded, so predictions are wrong, too."""
BATCHES = (BatchSpeed(batch=2, factors=(0.9, 1.0, 0.6)), BatchSpeed(batch=8, factors=(0.8, 1.0, 0.25)))

FIRST_BATCHES = 4
"""A fault strikes one of this many first batches with samples of several tasks."""

Computed: TypeAlias = tuple[Sequence[list[Array]], float]
"""The results of a batch, and the seconds it took."""


class BatchFaults:
    """What happens to the batches of a region whose samples are of several tasks.

    During one of the first, the process is killed; from another one on, the model's last layer fails on one of its samples.
    """

    def __init__(self, draw: random.Random, kill: Callable[[Process, random.Random], None]) -> None:
        self.met: Counter[str] = Counter()
        self.bad: dict[str, int] = {}  # task -> its sample on which the model fails
        self._draw, self._kill = draw, kill
        self._to_kill, self._to_spoil = draw.randint(1, FIRST_BATCHES), draw.randint(1, FIRST_BATCHES)

    def is_bad(self, one: ModelledSample) -> bool:
        """Whether the model fails on this sample."""
        return one.last == len(LAYER_S) and self.bad.get(one.plan.task_id) == one.sample

    async def watch(
        self, computing: Awaitable[Computed], process: Process, batch: Sequence[ModelledSample]
    ) -> Computed:
        """Let the faults strike a batch that a process begins to compute, and count what it met."""
        self._strike(process, batch)
        kills = process.kills
        try:
            return await computing
        finally:
            self.met["computed"] += 1
            self.met["process_killed"] += process.kills != kills
            self.met["bad_sample"] += any(map(self.is_bad, batch))

    def _strike(self, process: Process, batch: Sequence[ModelledSample]) -> None:
        self._to_kill -= 1
        if self._to_kill == 0:
            self._kill(process, self._draw)
        self._to_spoil -= 1
        last = [one for one in batch if one.last == len(LAYER_S) and one.plan.session is None]
        if self._to_spoil <= 0 and last and not self.bad:
            spoiled = self._draw.choice(last)
            self.bad[spoiled.plan.task_id] = spoiled.sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What the machines of a region have in common."""

    say: Say
    codecs: bool  # whether their profiles have a lossless codec
    batches: bool  # whether they compute samples in batches
    faults: BatchFaults | None  # what happens to their batches
    programs: Programs


class CheckedRunner(ModelledRunner):
    """A modelled machine whose tensors have checkable content, so that a mix-up of samples is detected."""

    def __init__(self, settings: NodeSettings, machines: Machines) -> None:
        layer_s = (seconds * SPEED[settings.role] for seconds in LAYER_S)
        codecs, batches = CODECS if machines.codecs else None, BATCHES if machines.batches else None
        super().__init__([toy_profile(settings.name, layer_s, CUT_BYTES, codecs, batches)], self._batcher)
        self._machines = machines
        self._node = settings.name
        self._slots = settings.slots
        self._open: Counter[tuple[str, int]] = Counter()  # open stations of tasks that take slots, by attempt

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """The content of position 0."""
        return lambda sample: [content(task.task_id, sample, 0)]

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        """A station; the node must have no more tasks with open stations than slots. A session takes no slot."""
        if plan.session is None:
            self._open[plan.task_id, plan.attempt] += 1
            if self._slots and len(self._open) > self._slots:
                what = f"{self._node} computes {len(self._open)} tasks at once, it has {self._slots} slots"
                self._machines.say("G2", what)
        return super().station(plan, first, last, pace)

    def closed(self, plan: AttemptPlan) -> None:
        """Record that a station was closed."""
        if plan.session is None:
            self._open[plan.task_id, plan.attempt] -= 1
            self._open += Counter()  # drops the attempts without stations

    def compute(self, one: ModelledSample) -> list[Array]:
        """Check the inputs, and return the content that the outputs must have. Raises `ModelError` on a bad sample."""
        task_id, first, last = one.plan.task_id, one.first, one.last
        session = one.plan.session is not None
        number = frame_number(one.inputs) if session else one.sample
        if not (same_frame if session else same)(one.inputs, task_id, number, first):
            what = f"{self._node} received wrong content for {task_id}/{number} at position {first}"
            self._machines.say("G5", what)
        faults = self._machines.faults
        if faults is not None and faults.is_bad(one):
            raise ModelError(one.plan.model, f"it fails on sample {number} of {task_id}")
        return [(frame_content if session else content)(task_id, number, last)]

    def coder(self, plan: AttemptPlan, position: int, codec: Codec, pace: PaceClock) -> Coder:
        """A coder that takes the time of a modelled one, and really encodes and decodes."""
        return _RealCoder(super().coder(plan, position, codec, pace), codec, position, self._machines.programs)

    def _batcher(
        self, compute: Callable[[Sequence[ModelledSample]], Awaitable[Computed]], **more: int
    ) -> ModelledBatcher:
        faults = self._machines.faults

        def watched(batch: Sequence[ModelledSample]) -> Awaitable[Computed]:
            computing = compute(batch)
            if faults is None or len({one.plan.task_id for one in batch}) == 1:
                return computing
            return faults.watch(computing, running_process(), batch)

        return self._machines.programs.batcher(watched, **more)


class _RealCoder:
    """A coder of samples with content."""

    def __init__(self, modelled: Coder, codec: Codec, position: int, programs: Programs) -> None:
        self._modelled, self._codec, self._decode = modelled, codec, programs.decode
        self._limit_bytes = CUT_BYTES[position]

    @property
    def waited_s(self) -> float:
        return self._modelled.waited_s

    async def encode(self, tensors: Sequence[Array], ready_s: float) -> Encoded:
        await self._modelled.encode(tensors, ready_s)
        return encode_sample(self._codec, tensors)

    async def decode(self, encoded: Encoded, ready_s: float) -> list[Array]:
        await self._modelled.decode(encoded, ready_s)
        return self._decode(encoded, self._limit_bytes)
