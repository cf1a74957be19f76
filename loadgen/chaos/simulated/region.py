"""The region under test: its nodes, and tensors whose content identifies their sample."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bus.codecs.coding import decode_sample, encode_sample
from bus.frames import AttemptPlan
from bus.messages import TaskSubmitted
from bus.tensors import Array, Encoded
from bus.values import Codec, CodecProfile, Role
from loadgen.chaos.simulated.oracle import Say
from loadgen.sim.region import toy_profile
from stages.node import NodeSettings
from stages.runner import Coder, ModelledRunner, PaceClock, Station

LEASE_S = 4.0
CUT_BYTES = (9_000, 14_000, 1_200, 3_000)
LAYER_S = (0.08, 0.02, 0.06)
SPEED = {Role.DEVICE: 5.0, Role.EDGE: 2.0, Role.CLOUD: 1.0}
SLOTS = 1
NUMBER_BYTES = 4
LINK1_BPS, LINK2_BPS = 1_500_000, 800_000
CODECS = tuple(
    CodecProfile(position=position, codec=Codec.ZSTD, bytes=CUT_BYTES[position] // 2, encode_s=0.002, decode_s=0.001)
    for position in range(len(LAYER_S))
)
"""What profiles say of a lossless codec. The content is hardly smaller when encoded, so predictions are wrong, too."""

Decode = Callable[[Encoded, int], list[Array]]
"""See `bus.codecs.coding.decode_sample`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosScenario:
    """Size of the region under test and the amount of faults."""

    devices: int = 2
    edges: int = 2
    clouds: int = 2
    planners: int = 2
    tasks: int = 8
    samples: tuple[int, int] = (2, 24)
    faults_s: float = 20.0  # virtual seconds of fault injection
    faults: tuple[int, int] = (5, 12)  # minimum and maximum number of faults
    converge_s: float = 200.0  # virtual seconds after healing within which every task must have ended
    clocks: bool = True  # wall clocks are off by minutes, and jump
    cameras: float = 0.5  # probability that a device has an application that pushes frames through sessions
    routes: float = 0.4  # probability that the policy is one whose tasks take several routes
    codecs: float = 0.3  # probability that activations may be encoded on the links
    max_waiting: int | None = None  # queue limit; None: drawn from the seed, sometimes very small

    @property
    def edge_names(self) -> list[str]:
        """The names of the edges."""
        return [f"e{index + 1}" for index in range(self.edges)]

    def nodes(self) -> list[NodeSettings]:
        """The settings of all stages: clouds, edges, devices."""
        return [
            *(NodeSettings(name=f"c{index + 1}", role=Role.CLOUD, lease_s=LEASE_S) for index in range(self.clouds)),
            *(
                NodeSettings(
                    name=name,
                    role=Role.EDGE,
                    slots=SLOTS,
                    link1_capacity_bps=LINK1_BPS,
                    link2_capacity_bps=LINK2_BPS,
                    lease_s=LEASE_S,
                )
                for name in self.edge_names
            ),
            *(NodeSettings(name=f"d{index + 1}", role=Role.DEVICE, lease_s=LEASE_S) for index in range(self.devices)),
        ]


@lru_cache(maxsize=4096)
def content(task_id: str, sample: int, position: int) -> Array:
    """The tensor of a sample at a cut position; every byte depends on task, sample, position and its own index."""
    tag = zlib.crc32(f"{task_id}/{sample}/{position}".encode())
    values = (np.arange(CUT_BYTES[position], dtype=np.uint32) * np.uint32(2654435761) + np.uint32(tag)) >> np.uint32(11)
    array: Array = values.astype(np.uint8)
    array.flags.writeable = False
    return array


def same(tensors: Sequence[Array], task_id: str, sample: int, position: int) -> bool:
    """Whether these are the tensors of that sample at that position."""
    return len(tensors) == 1 and np.array_equal(tensors[0], content(task_id, sample, position))


@lru_cache(maxsize=4096)
def frame_content(task_id: str, number: int, position: int) -> Array:
    """The tensor of a session's frame: as that of a sample, but with its number in front.

    Each attempt at a session numbers its frames from 0, so a frame is recognised by its content.
    """
    array: Array = content(task_id, number, position).copy()
    array[:NUMBER_BYTES] = np.frombuffer(number.to_bytes(NUMBER_BYTES, "little"), np.uint8)
    array.flags.writeable = False
    return array


def frame_number(tensors: Sequence[Array]) -> int:
    """The number of a frame, from its content."""
    return int.from_bytes(tensors[0][:NUMBER_BYTES].tobytes(), "little")


def same_frame(tensors: Sequence[Array], task_id: str, number: int, position: int) -> bool:
    """Whether these are the tensors of that frame at that position."""
    return len(tensors) == 1 and np.array_equal(tensors[0], frame_content(task_id, number, position))


class CheckedRunner(ModelledRunner):
    """A modelled machine whose tensors have checkable content, so that a mix-up of samples is detected."""

    def __init__(
        self, settings: NodeSettings, say: Say, *, codecs: bool = False, decode: Decode = decode_sample
    ) -> None:
        """`codecs`: the profile has a lossless one; `decode`: how samples are decoded."""
        layer_s = (seconds * SPEED[settings.role] for seconds in LAYER_S)
        super().__init__([toy_profile(settings.name, layer_s, CUT_BYTES, CODECS if codecs else None)])
        self._decode = decode
        self._say = say
        self._node = settings.name
        self._slots = settings.slots
        self._open: Counter[tuple[str, int]] = Counter()  # open stations, by attempt

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """The content of position 0."""
        return lambda sample: [content(task.task_id, sample, 0)]

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        """A station that checks its inputs, and that the node has no more tasks with open stations than slots."""
        inner = super().station(plan, first, last, pace)
        if plan.session is not None:
            return _SessionStation(inner, self, plan, first, last)
        self._open[plan.task_id, plan.attempt] += 1
        if self._slots and len(self._open) > self._slots:
            self._say("G2", f"{self._node} computes {len(self._open)} tasks at once, it has {self._slots} slots")
        return _CheckedStation(inner, self, plan, first, last)

    def coder(self, plan: AttemptPlan, position: int, codec: Codec, pace: PaceClock) -> Coder:
        """A coder that takes the time of a modelled one, and really encodes and decodes."""
        return _RealCoder(super().coder(plan, position, codec, pace), codec, CUT_BYTES[position], self._decode)

    def closed(self, plan: AttemptPlan) -> None:
        """Record that a station of an attempt was closed."""
        self._open[plan.task_id, plan.attempt] -= 1
        self._open += Counter()  # drops the attempts without stations

    def wrong(self, task_id: str, sample: int, position: int) -> None:
        """Report that a tensor differs from what was sent."""
        self._say("G5", f"{self._node} received wrong content for {task_id}/{sample} at position {position}")


class _RealCoder:
    """A coder of samples with content."""

    def __init__(self, modelled: Coder, codec: Codec, limit_bytes: int, decode: Decode) -> None:
        self._modelled, self._codec, self._limit_bytes, self._decode = modelled, codec, limit_bytes, decode

    @property
    def waited_s(self) -> float:
        return self._modelled.waited_s

    async def encode(self, tensors: Sequence[Array], ready_s: float) -> Encoded:
        await self._modelled.encode(tensors, ready_s)
        return encode_sample(self._codec, tensors)

    async def decode(self, encoded: Encoded, ready_s: float) -> list[Array]:
        await self._modelled.decode(encoded, ready_s)
        return self._decode(encoded, self._limit_bytes)


class _CheckedStation:
    """A station that checks its inputs and returns the content that its outputs must have."""

    def __init__(self, inner: Station, runner: CheckedRunner, plan: AttemptPlan, first: int, last: int) -> None:
        self._inner, self._runner, self._plan = inner, runner, plan
        self._task_id, self._first, self._last = plan.task_id, first, last

    @property
    def waited_s(self) -> float:
        return self._inner.waited_s

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        if not same(inputs, self._task_id, sample, self._first):
            self._runner.wrong(self._task_id, sample, self._first)
        await self._inner.run(sample, inputs, ready_s)
        return [content(self._task_id, sample, self._last)]

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return None

    def close(self) -> None:
        self._inner.close()
        self._runner.closed(self._plan)


class _SessionStation(_CheckedStation):
    """The same for the frames of a session, which takes no slot."""

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        number = frame_number(inputs)
        if not same_frame(inputs, self._task_id, number, self._first):
            self._runner.wrong(self._task_id, number, self._first)
        await self._inner.run(sample, inputs, ready_s)
        return [frame_content(self._task_id, number, self._last)]

    def close(self) -> None:
        self._inner.close()
