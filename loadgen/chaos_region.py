"""The region that is broken: its processes, and tensors whose content tells which sample they are of."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np

from bus.frames import Plan
from bus.memory import MemoryBus
from bus.messages import TaskSubmitted
from bus.tensors import Array
from bus.values import ModelProfile, Role
from loadgen.chaos_process import Process
from stages.device import Device, ResultSink
from stages.hop import Hop
from stages.node import Node, NodeSettings
from stages.runner import ModelledRunner, Station

LEASE_S = 4.0
MODEL = "toy"
CUT_BYTES = (9_000, 14_000, 1_200, 3_000)
LAYER_S = (0.08, 0.02, 0.06)
SPEED = {Role.DEVICE: 5.0, Role.EDGE: 2.0, Role.CLOUD: 1.0}
SLOTS = 1
LINK1_BPS, LINK2_BPS = 1_500_000, 800_000


class Judge(Protocol):
    """Who is told that a guarantee did not hold."""

    def say(self, guarantee: str, what: str) -> None: ...


@lru_cache(maxsize=4096)
def content(task_id: str, sample: int, position: int) -> Array:
    """What crosses position `position` for a sample: every byte depends on all three, and on where it stands."""
    tag = zlib.crc32(f"{task_id}/{sample}/{position}".encode())
    values = (np.arange(CUT_BYTES[position], dtype=np.uint32) * np.uint32(2654435761) + np.uint32(tag)) >> np.uint32(11)
    array: Array = values.astype(np.uint8)
    array.flags.writeable = False
    return array


def same(tensors: Sequence[Array], task_id: str, sample: int, position: int) -> bool:
    """Whether these are the tensors of that sample at that position."""
    return len(tensors) == 1 and np.array_equal(tensors[0], content(task_id, sample, position))


class CheckedRunner(ModelledRunner):
    """A modelled machine whose tensors have a content, so that a stage notices when it is given another's."""

    def __init__(self, profile: ModelProfile, judge: Judge, node: str, slots: int) -> None:
        super().__init__([profile])
        self._judge = judge
        self._node = node
        self._slots = slots
        self._open = 0

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """The content of position 0."""
        return lambda sample: [content(task.task_id, sample, 0)]

    def station(self, plan: Plan, first: int, last: int) -> Station:
        """A place that checks what it is given, and that no more places are open than the node has slots."""
        self._open += 1
        if self._slots and self._open > self._slots:
            self._judge.say("G2", f"{self._node} computes {self._open} tasks at once, it has {self._slots} slots")
        return _CheckedStation(super().station(plan, first, last), self, plan.task_id, first, last)

    def closed(self) -> None:
        """A place is free again."""
        self._open -= 1

    def wrong(self, task_id: str, sample: int, position: int) -> None:
        """Something else came than what was sent."""
        self._judge.say("G5", f"{self._node} was given a wrong content for {task_id}/{sample} at {position}")


class _CheckedStation:
    def __init__(self, inner: Station, runner: CheckedRunner, task_id: str, first: int, last: int) -> None:
        self._inner, self._runner = inner, runner
        self._task_id, self._first, self._last = task_id, first, last

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        if not same(inputs, self._task_id, sample, self._first):
            self._runner.wrong(self._task_id, sample, self._first)
        await self._inner.run(sample, inputs, ready_s)
        return [content(self._task_id, sample, self._last)]

    def close(self) -> None:
        self._inner.close()
        self._runner.closed()


@dataclass(slots=True)
class Stage:
    """A stage's process, and what runs in it at the moment."""

    settings: NodeSettings
    process: Process | None = None
    node: Node | None = None
    work: Device | Hop | None = None
    counters: Counter[str] = field(default_factory=Counter)  # of those that died

    async def serve(self, bus: MemoryBus, judge: Judge, show: ResultSink, kept: Callable[[str], Iterable[int]]) -> None:
        """Run a fresh process of it."""
        settings = self.settings
        if self.node is not None:
            self.counters.update(self.node.status.counters)
        node = Node(bus, settings, CheckedRunner(profile(settings), judge, settings.name, settings.slots))
        self.work = Device(node, show, kept=kept) if settings.role is Role.DEVICE else Hop(node)
        self.node = node
        await node.run(self.work)

    async def leave(self) -> None:
        """What it does on SIGTERM."""
        if self.work is None or self.node is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await self.work.drain()
        await self.node.leave()

    def counted(self) -> Counter[str]:
        """What its processes counted, the dead ones too."""
        found = Counter(self.counters)
        if self.node is not None:
            found.update(self.node.status.counters)
        return found


def profile(settings: NodeSettings) -> ModelProfile:
    """How fast a node of this role runs the model."""
    return ModelProfile(
        model=MODEL,
        sha256="0" * 64,
        platform=settings.name,
        layer_names=("conv", "pool", "dense"),
        layer_s=tuple(seconds * SPEED[settings.role] for seconds in LAYER_S),
        cut_bytes=CUT_BYTES,
    )


def cast(clouds: int, edges: Iterable[str], devices: int) -> list[NodeSettings]:
    """Who plays."""
    return [
        *(NodeSettings(name=f"c{i + 1}", role=Role.CLOUD, lease_s=LEASE_S) for i in range(clouds)),
        *(
            NodeSettings(
                name=name,
                role=Role.EDGE,
                slots=SLOTS,
                link1_capacity_bps=LINK1_BPS,
                link2_capacity_bps=LINK2_BPS,
                lease_s=LEASE_S,
            )
            for name in edges
        ),
        *(NodeSettings(name=f"d{i + 1}", role=Role.DEVICE, lease_s=LEASE_S) for i in range(devices)),
    ]
