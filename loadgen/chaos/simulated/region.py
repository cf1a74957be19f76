"""The region under test: its size, its nodes, and tensors whose content identifies their sample."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bus.tensors import Array
from bus.values import Role
from stages.membership.settings import NodeSettings

LEASE_S = 4.0
CUT_BYTES = (9_000, 14_000, 1_200, 3_000)
LAYER_S = (0.08, 0.02, 0.06)
SPEED = {Role.DEVICE: 5.0, Role.EDGE: 2.0, Role.CLOUD: 1.0}
SLOTS = 1
NUMBER_BYTES = 4
LINK1_BPS, LINK2_BPS = 1_500_000, 800_000


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
    batches: float = 0.6  # probability that machines compute samples of several tasks together
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
    return len(tensors) == 1 and _equal(tensors[0], content(task_id, sample, position))


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
    return len(tensors) == 1 and _equal(tensors[0], frame_content(task_id, number, position))


def _equal(one: Array, other: Array) -> bool:
    """As `np.array_equal` for arrays of bytes, which takes several times as long."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
