"""What one attempt computes on one stage: its segments take turns, one sample after another, as on one platform."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bus.frames import AttemptPlan
from bus.tensors import Array
from stages.measuring.clock import exact_clock
from stages.node import Node
from stages.runner import PaceClock, Station


class Segment(NamedTuple):
    """Layers first+1..last of a model."""

    first: int
    last: int


class Computing:
    """The stations of one attempt on one stage, and how long they were busy."""

    def __init__(self, node: Node, plan: AttemptPlan, part: str) -> None:
        """`part` is the part of the delay that computing here belongs to: device, edge or cloud."""
        self._node, self._plan, self._part = node, plan, part
        self._stations: dict[Segment, Station] = {}
        self._opened_s = float("-inf")  # when the stations were ready, where waiting for them is no computing
        self._began_s: float | None = None  # start of the first computation
        self._free_s = float("-inf")  # end of the last one
        self.busy_s = 0.0

    async def prepare(self, segments: Iterable[Segment]) -> None:
        """Prepare the models of these segments. Raises what `Runner.prepare` does."""
        for first, last in dict.fromkeys(segments):
            await self._node.runner.prepare(self._plan, first, last)

    def open(self, segments: Iterable[Segment]) -> None:
        """Make the stations of prepared segments."""
        pace = PaceClock()
        for segment in dict.fromkeys(segments):
            self._stations[segment] = self._node.runner.station(self._plan, *segment, pace)

    def begin(self) -> None:
        """Count no time before now: samples waited for a slot, or for their models."""
        self._opened_s = self._free_s = exact_clock()()

    def close(self) -> None:
        """Release the stations."""
        for station in self._stations.values():
            station.close()
        self._stations.clear()

    async def run(
        self, segment: Segment, sample: int, inputs: Sequence[Array], ready_s: float
    ) -> tuple[list[Array], float]:
        """The outputs of a segment for a sample whose inputs were ready at `ready_s`, and when they were ready.

        Call it for one sample at a time.
        """
        station = self._stations[segment]
        waited_s = station.waited_s
        outputs = await station.run(sample, inputs, max(ready_s, self._opened_s))
        now = exact_clock()()
        self._count(min(now, max(ready_s, self._free_s) + station.waited_s - waited_s), now)
        return outputs, now

    def run_now(self, segment: Segment, inputs: Sequence[Array]) -> tuple[list[Array], float] | None:
        """Compute a sample on the event loop: the outputs and the seconds it took; None where other tasks would wait."""
        clock = exact_clock()
        begin_s = clock()
        outputs = self._stations[segment].run_now(inputs)
        if outputs is None:
            return None
        now = clock()
        self._count(begin_s, now)
        return outputs, now - begin_s

    def _count(self, begin_s: float, end_s: float) -> None:
        if self._began_s is None:
            self._began_s = begin_s
        self._free_s = end_s
        self.busy_s += end_s - begin_s
        self._node.busy(f"{self._part}_s", self._plan.task_id, begin_s, end_s)

    def record_span(self, parent_id: str | None = None) -> None:
        """Record the trace span of computing."""
        self._node.span(self._part, self._plan, self._began_s, self._free_s, self.busy_s, parent_id)
