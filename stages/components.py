"""The replaceable components of a stage.

The defaults are the real ones. A test passes a variant of one component to plant a bug that the simulation must find.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from bus import snapshots
from bus.decisions import DecisionLog
from bus.messages import Snapshot
from bus.port import Bus, Reader
from bus.tensors import Assembler
from stages.membership.fences import Fences
from stages.membership.lease import Lease
from stages.network.frame_sender import FrameSender
from stages.offsets import OffsetLedger
from stages.sample_ranges import SampleRanges
from stages.window import MissingResults, Window

OpenDecisions = Callable[[Bus, int], Awaitable[tuple[Snapshot | None, Reader]]]
"""See `bus.snapshots.open_decisions`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageComponents:
    """Factories with the parameters of the real classes."""

    open_decisions: OpenDecisions = snapshots.open_decisions  # finds the snapshot from which a node starts
    decision_log: Callable[..., DecisionLog] = DecisionLog
    fences: Callable[[int], Fences] = Fences
    lease: Callable[[float], Lease] = Lease
    offsets: Callable[[], OffsetLedger] = OffsetLedger  # of an edge or cloud node
    assembler: Callable[[], Assembler] = Assembler  # of one attempt on one stage
    done: Callable[[], SampleRanges] = SampleRanges  # of one attempt on an edge or cloud node
    frame_sender: Callable[..., FrameSender] = FrameSender
    window: Callable[[], Window] = Window  # of one attempt on its device
    missing: Callable[[Iterable[int]], MissingResults] = MissingResults  # of one attempt on its device
