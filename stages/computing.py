"""What one attempt computes on one stage: its segments take turns, one sample after another, as on one platform."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from bus.errors import ProtocolError
from bus.frames import AttemptPlan
from bus.tensors import Activations, Array, Encoded
from bus.values import Codec
from stages.measuring.clock import exact_clock
from stages.node import Node
from stages.runner import BatchStation, Coder, PaceClock, Station

T = TypeVar("T")


class Segment(NamedTuple):
    """Layers first+1..last of a model."""

    first: int
    last: int
    arrives: Codec = Codec.RAW  # of its inputs
    leaves: Codec = Codec.RAW  # of its outputs

    def __hash__(self) -> int:
        return hash((self.first, self.last))  # hashing codecs takes longer

    @property
    def works(self) -> bool:
        """Whether there is anything to do for it: layers, or a codec."""
        return self.first != self.last or self.arrives is not self.leaves


def tensors_of(outputs: Activations) -> list[Array]:
    """The outputs of a segment that does not encode them."""
    assert isinstance(outputs, list)
    return outputs


class Sample(Protocol):
    """A sample to compute."""

    @property
    def sample(self) -> int:
        """Its number in the task."""

    @property
    def inputs(self) -> Activations:
        """What the segment takes."""

    @property
    def ready_s(self) -> float:
        """When the inputs were ready, on the loop's clock."""


class _Works(NamedTuple):
    """What a segment needs: layers, codecs, or both."""

    station: Station | None
    decoder: Coder | None
    encoder: Coder | None

    @property
    def waited_s(self) -> float:
        """How long samples have waited because other tasks used the runner."""
        return sum([one.waited_s for one in self if one is not None])


class Computing:
    """The stations of one attempt on one stage, and how long they were busy."""

    def __init__(self, node: Node, plan: AttemptPlan, part: str) -> None:
        """`part` is the part of the delay that computing here belongs to: device, edge or cloud."""
        self._node, self._plan, self._part = node, plan, part
        self._works: dict[Segment, _Works] = {}
        self._together: dict[Segment, BatchStation] = {}  # stations that compute several samples together
        self._busy_part = f"{part}_s"
        self._clock = exact_clock()
        self._opened_s = float("-inf")  # when the stations were ready; waiting for them does not count as computing
        self._began_s: float | None = None  # start of the first computation
        self._free_s = float("-inf")  # end of the last one
        self.busy_s = 0.0
        self.batches = 0.0  # sum of 1/n over the samples that were computed in batches, each of n samples
        self.predicted_s = 0.0  # what the plan predicts for the same samples, where the caller says so

    async def prepare(self, segments: Iterable[Segment]) -> None:
        """Prepare the models of these segments. Raises what `Runner.prepare` does."""
        for first, last in dict.fromkeys((segment.first, segment.last) for segment in segments):
            await self._node.runner.prepare(self._plan, first, last)

    def open(self, segments: Iterable[Segment]) -> None:
        """Make the stations of prepared segments."""
        pace, runner, plan = PaceClock(), self._node.runner, self._plan
        stations: dict[tuple[int, int], Station] = {}
        for segment in segments:
            first, last, arrives, leaves = segment
            if first != last and (first, last) not in stations:
                stations[first, last] = runner.station(plan, first, last, pace)
            station = stations.get((first, last))
            self._works[segment] = _Works(
                station,
                None if arrives is Codec.RAW else runner.coder(plan, first, arrives, pace),
                None if leaves is Codec.RAW else runner.coder(plan, last, leaves, pace),
            )
            if isinstance(station, BatchStation):
                self._together[segment] = station

    def begin(self) -> None:
        """Count no time before now: samples waited for a slot, or for their models."""
        self._opened_s = self._free_s = self._clock()

    def close(self) -> None:
        """Release the stations."""
        for station in {id(one.station): one.station for one in self._works.values()}.values():
            if station is not None:
                station.close()
        self._works.clear()
        self._together.clear()

    async def run(
        self, segment: Segment, sample: int, inputs: Activations, ready_s: float, predicted_s: float = 0.0
    ) -> tuple[Activations, float]:
        """The outputs of a segment for a sample whose inputs were ready at `ready_s`, and when they were ready.

        `predicted_s` is what the plan predicts. Call it for one sample at a time. Raises `ProtocolError` where the inputs are
        encoded wrongly.
        """
        works = self._works[segment]
        station, decoder, encoder = works
        if station is None or decoder is not None or encoder is not None:
            return await self._run_coded(works, sample, inputs, ready_s, predicted_s)
        waited_s = station.waited_s
        outputs = await station.run(sample, tensors_of(inputs), max(ready_s, self._opened_s))
        done_s = self._clock()
        self._count(min(done_s, max(ready_s, self._free_s) + station.waited_s - waited_s), done_s)
        self.predicted_s += predicted_s
        return outputs, done_s

    def most_at_once(self, segment: Segment) -> int:
        """How many samples `run_together` should be given; 1: use `run`."""
        station = self._together.get(segment)
        return 1 if station is None else station.most_at_once

    async def run_together(
        self, segment: Segment, samples: Sequence[Sample], predicted_s: float = 0.0
    ) -> AsyncGenerator[tuple[Activations, float]]:
        """What `run` returns, for each of several samples in their order, as soon as it is known.

        A sample that is encoded wrongly raises its `ProtocolError` after the samples before it.
        """
        works, station = self._works[segment], self._together[segment]
        begin_s, before_s = self._clock(), self.busy_s
        decoded, fault = await self._decoded(works.decoder, samples)
        submitted = [station.submit(sample, tensors, ready_s) for sample, tensors, ready_s in decoded]
        try:
            for future in submitted:
                outputs: Activations
                outputs, share_s, batch = await future
                if works.encoder is not None:
                    outputs = await self._timed(works.encoder, works.encoder.encode(outputs, self._clock()))
                self.busy_s += share_s  # at once, since a report may be sent before the last sample is done
                self.batches += 1.0 / batch
                self.predicted_s += predicted_s
                yield outputs, self._clock()
            if fault is not None:
                raise fault
        finally:
            for future in submitted:
                future.cancel()  # no effect on those that are done
            done_s = self._clock()
            self._note_interval(max(begin_s, done_s - (self.busy_s - before_s)), done_s)

    async def _decoded(
        self, decoder: Coder | None, samples: Sequence[Sample]
    ) -> tuple[list[tuple[int, list[Array], float]], ProtocolError | None]:
        """Number, tensors and readiness of each sample up to the first that is encoded wrongly, and its error."""
        found: list[tuple[int, list[Array], float]] = []
        for one in samples:
            inputs, ready_s = one.inputs, max(one.ready_s, self._opened_s)
            if decoder is not None and isinstance(inputs, Encoded):
                try:
                    inputs = await self._timed(decoder, decoder.decode(inputs, self._clock()))
                except ProtocolError as error:
                    return found, error
                ready_s = self._clock()
            found.append((one.sample, tensors_of(inputs), ready_s))
        return found, None

    async def _timed(self, coder: Coder, work: Awaitable[T]) -> T:
        """What a coder returns; counts how long it took without waiting for other tasks."""
        begin_s, waited_s = self._clock(), coder.waited_s
        found = await work
        self.busy_s += max(0.0, self._clock() - begin_s - (coder.waited_s - waited_s))
        return found

    async def _run_coded(
        self, works: _Works, sample: int, inputs: Activations, ready_s: float, predicted_s: float
    ) -> tuple[Activations, float]:
        station, decoder, encoder = works
        waited_s = works.waited_s
        done_s, outputs = max(ready_s, self._opened_s), inputs
        if decoder is not None and isinstance(outputs, Encoded):
            outputs = await decoder.decode(outputs, done_s)
            done_s = self._clock()
        others_s = 0.0
        if isinstance(station, BatchStation):
            begin_s = self._clock()
            outputs, share_s, batch = await station.submit(sample, tensors_of(outputs), done_s)
            done_s = self._clock()
            self.batches += 1.0 / batch
            others_s = max(0.0, done_s - begin_s - share_s)
        elif station is not None:
            outputs = await station.run(sample, tensors_of(outputs), done_s)
            done_s = self._clock()
        if encoder is not None:
            outputs = await encoder.encode(tensors_of(outputs), done_s)
            done_s = self._clock()
        waited_s = works.waited_s - waited_s + others_s
        self._count(min(done_s, max(ready_s, self._free_s) + waited_s), done_s)
        self.predicted_s += predicted_s
        return outputs, done_s

    def run_now(self, segment: Segment, inputs: Sequence[Array]) -> tuple[list[Array], float] | None:
        """Compute a sample on the event loop: the outputs and the seconds it took; None where other tasks would wait."""
        station = self._works[segment].station
        assert station is not None
        begin_s = self._clock()
        outputs = station.run_now(inputs)
        if outputs is None:
            return None
        now = self._clock()
        self._count(begin_s, now)
        return outputs, now - begin_s

    def _count(self, begin_s: float, end_s: float) -> None:
        self.busy_s += end_s - begin_s
        self._note_interval(begin_s, end_s)

    def _note_interval(self, begin_s: float, end_s: float) -> None:
        """Note when it computed, whose time is in `busy_s`."""
        if self._began_s is None:
            self._began_s = begin_s
        self._free_s = end_s
        self._node.busy(self._busy_part, self._plan.task_id, begin_s, end_s)

    def record_span(self, parent_id: str | None = None) -> None:
        """Record the trace span of computing."""
        self._node.spans.record(self._part, self._plan, self._began_s, self._free_s, self.busy_s, parent_id)
