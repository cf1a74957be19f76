"""Whatever a lying node reports, the planner goes on, its records can be read, and a replay has the same hash."""

from __future__ import annotations

import random
import sys
from collections import Counter
from typing import Any

import pytest

from bus import messages, topics
from bus.errors import ProtocolError
from bus.messages import (
    Ended,
    Learned,
    LinkMeasurement,
    NodeAnnounced,
    NodeHeartbeat,
    SpeedMeasurement,
    Start,
    TaskCompleted,
    TaskState,
)
from bus.values import DELAY_PARTS, Codec, CodecProfile, Parts
from planner.core.core import Event, PlannerCore, Tick
from planner.core.options import CoreOptions
from tests.unit.planner.scenes import MBPS, cloud, decision_of, device, edge, faster, only, profile, task, types

TINY = sys.float_info.min * sys.float_info.epsilon  # the least positive number
TIMES = (0.0, -0.0, TINY, 1e-300, 1e-9, 1e-3, 1.0, 3.7, 1e6, 1e12, 1e30)
SAMPLE_TIMES = tuple(seconds for seconds in TIMES if seconds <= 1e6)
COUNTS = (1, 2, 7, 10_000, 10_000_000)
EDGES, DEVICES = ("e1", "e2"), ("d1", "d2", "d3")


class LyingRegion:
    """A region whose nodes report extreme values within the bounds of messages; drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.core = PlannerCore(options=CoreOptions(learning=True))
        self._submitted = 0
        self._incarnations: Counter[str] = Counter()

    def start(self) -> list[Event]:
        return [edge("e1"), edge("e2"), cloud("c1"), *map(device, DEVICES)]

    def event(self) -> Event:
        """The next event. A lease never ends, so that all nodes stay."""
        draw = self.rng.choices((self._task, self._completed, self._heartbeat, self._announced, Tick), (5, 8, 4, 1, 1))[
            0
        ]
        return draw()

    def _seconds(self) -> float:
        return 10 ** self.rng.uniform(-6, 3) if self.rng.random() < 0.6 else self.rng.choice(TIMES)

    def _sample_s(self) -> float:
        return min(1e6, self._seconds())

    def _task(self) -> Event:
        rng = self.rng
        self._submitted += 1
        deadline_s = max(TINY, self._seconds()) if rng.random() < 0.1 else None
        samples, agreement = rng.choice(COUNTS), rng.choice((None, 0.5))
        name = f"t{self._submitted}"
        return task(name, rng.choice(DEVICES), samples=samples, deadline_s=deadline_s, min_agreement=agreement)

    def _completed(self) -> Event:
        rng = self.rng
        live = [one for one in self.core.tasks.values() if one.state is TaskState.RUNNING]
        if not live:
            return self._task()
        one = rng.choice(live)
        return TaskCompleted(
            task_id=one.task_id,
            attempt=one.attempt if rng.random() < 0.9 else rng.choice(COUNTS),
            node=one.submitted.device,
            measured=Parts(**{f"{part}_s": self._seconds() for part in DELAY_PARTS}),
            delay_s=self._seconds(),
            cloud=rng.choice((None, "c1", "d1", "unknown")),
            edge_batches=rng.choice((None, TINY, 0.5, 1e12)),
            cloud_batches=rng.choice((None, TINY, 0.5, 1e12)),
            route_samples=rng.choice((None, (), (0, 0), (1, 10_000_000))),
        )

    def _heartbeat(self) -> Event:
        rng = self.rng
        node = rng.choice((*EDGES, *DEVICES, "c1", "unknown"))
        link, at = (2, node) if node in EDGES else (1, rng.choice(EDGES))
        bps = rng.choice((None, 1, MBPS, 1 << 50))
        measured = LinkMeasurement(
            link=link, edge=at, latency_s=self._sample_s(), deviation_s=self._sample_s(), bps=bps
        )
        speed = SpeedMeasurement(model=rng.choice("mx"), factor=min(1e6, max(TINY, self._seconds())))
        return NodeHeartbeat(node=node, incarnation=f"i{self._incarnations[node]}", links=(measured,), speeds=(speed,))

    def _announced(self) -> Event:
        """A node with another profile, in a new incarnation or in the same."""
        rng = self.rng
        codecs = tuple(
            CodecProfile(position=p, codec=codec, bytes=rng.choice((0, 1_000)), encode_s=e, decode_s=d, agreement=1.0)
            for p, codec, e, d in (
                (position, Codec.Q8, rng.choice(SAMPLE_TIMES), rng.choice(SAMPLE_TIMES)) for position in range(3)
            )
        )
        one = profile(layer_s=tuple(min(1e5, self._seconds()) for _ in range(3))) if rng.random() < 0.5 else profile()
        model = one.model_copy(update={"codecs": codecs}) if rng.random() < 0.5 else one
        node = rng.choice((*EDGES, *DEVICES, "c1"))
        make = edge if node in EDGES else cloud if node == "c1" else device
        self._incarnations[node] += rng.random() < 0.5
        latency_s: dict[str, Any] = {f"link{link}_latency_s": rng.choice((None, self._sample_s())) for link in (1, 2)}
        return make(node, incarnation=f"i{self._incarnations[node]}", models=(model,), lease_s=1e12, **latency_s)


@pytest.mark.parametrize("seed", range(12))
def test_no_report_ends_the_planner_and_every_record_can_be_read(seed: int) -> None:
    region = LyingRegion(seed)
    core, replica = region.core, PlannerCore(options=CoreOptions(learning=True))
    now, seq, seen = 0.0, 0, Counter[str]()
    begin = [one.model_copy(update={"lease_s": 1e12, "incarnation": "i0"}) for one in region.start()]  # type: ignore[union-attr]
    for i in range(400):
        now += region.rng.choice((0.0, 0.01, 0.5, 5.0))
        changes = core.handle(begin[i] if i < len(begin) else region.event(), now)
        if changes:
            seq += 1
            record = messages.encode(decision_of(changes, seq, core.now_s, core))
            replica.fold(messages.decode(topics.DECISIONS, record))
            assert replica.state_hash == core.state_hash, types(changes)
        seen.update(types(changes))
    core.validate()
    assert PlannerCore.from_state(core.to_state(), options=core.options).state_hash == core.state_hash
    assert min(seen["learned"], seen["start"], seen["ended"]) > 50


@pytest.mark.parametrize("times", [(TINY,) * 3, (TINY, 1e30, TINY), (1e30,) * 3])
def test_an_honest_task_teaches_after_a_liar(times: tuple[float, ...]) -> None:
    core = PlannerCore(options=CoreOptions(learning=True), policy="edge-only")
    for node in (edge(), device("d1"), device("d2")):
        core.handle(node, 0.0)
    for i, busy_s in enumerate(times):
        only(core.handle(task(f"lie{i}", "d1"), float(i)), Start)
        lie = TaskCompleted(task_id=f"lie{i}", attempt=1, node="d1", measured=Parts(edge_s=busy_s), delay_s=busy_s)
        only(core.handle(lie, i + 0.5), Learned)
    only(core.handle(task("true", "d2"), 10.0), Start)
    true = TaskCompleted(task_id="true", attempt=1, node="d2", measured=Parts(edge_s=0.15), delay_s=0.3)
    changes = core.handle(true, 11.0)
    assert only(changes, Learned).task_id == "true"
    assert only(changes, Ended).state is TaskState.COMPLETED


@pytest.mark.parametrize("now", [1.0, 1e9])
def test_a_deadline_that_has_passed_with_its_admission_expires_the_task(now: float) -> None:
    core = PlannerCore()
    for node in (edge(), device()):
        core.handle(node, 0.0)
    changes = core.handle(task(deadline_s=TINY), now)
    assert (types(changes), only(changes, Ended).state) == (["admitted", "ended"], TaskState.EXPIRED)


@pytest.mark.parametrize("latency_s", [1e7, 1e30, -1.0])
def test_a_latency_beyond_its_bound_is_rejected_when_it_comes_in(latency_s: float) -> None:
    """Many samples times such a latency would be a delay that no reader accepts."""
    measured = LinkMeasurement.model_construct(link=1, edge="e1", latency_s=latency_s, deviation_s=0.0)
    heartbeat = NodeHeartbeat(node="d1", incarnation="i1").model_copy(update={"links": (measured,)})
    announced: NodeAnnounced = device().model_copy(update={"link1_latency_s": latency_s})
    for topic, message in ((topics.EVENTS, heartbeat), (topics.NODES, announced)):
        with pytest.raises(ProtocolError):
            messages.decode(topic, messages.encode(message))


def test_the_largest_latency_and_the_most_samples_give_a_record_that_can_be_read() -> None:
    core = PlannerCore(policy="edge-only", options=CoreOptions(learning=True))
    for node in (edge(models=(faster(profile(), 4.0),)), device(link1_latency_s=1e6)):
        core.handle(node, 0.0)
    changes = core.handle(task(samples=10_000_000), 0.0)
    record = messages.encode(decision_of(changes, 1, 0.0, core))
    assert messages.decode(topics.DECISIONS, record).changes == tuple(changes)
