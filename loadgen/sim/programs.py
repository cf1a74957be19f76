"""The programs that the processes of a simulated region run.

The defaults are the real ones. A test passes a variant with a planted bug to check that the simulation finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bus.codecs.coding import decode_sample
from bus.port import Bus
from bus.tensors import Array, Encoded
from planner.core.core import PlannerCore
from planner.service.service import PlannerService
from stages.batches import Batcher
from stages.devices.device import Device
from stages.hops.hop import Hop, hop_of
from stages.node import Node
from stages.runner import ModelledBatcher


def _unchanged(bus: Bus) -> Bus:
    return bus


@dataclass(frozen=True, slots=True)
class Programs:
    """Factories with the parameters of the real classes. Worker processes receive them, so the real ones can be pickled."""

    planner: Callable[..., PlannerService] = PlannerService
    core: Callable[..., PlannerCore] = PlannerCore
    node: Callable[..., Node] = Node
    device: Callable[..., Device] = Device
    hop: Callable[[Node], Hop] = hop_of
    decode: Callable[[Encoded, int], list[Array]] = decode_sample  # how modelled machines decode a sample
    batcher: Callable[..., ModelledBatcher] = Batcher  # what forms the batches of modelled machines
    client_bus: Callable[[Bus], Bus] = _unchanged  # the bus with which tasks are submitted


REAL = Programs()
