"""An edge or the cloud alone: what it does with frames that are good, doubled, foreign or poison."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from bus import messages, topics
from bus.errors import BusUnavailableError
from bus.frames import AttemptPlan, Frame, decode_frame, encode_frame
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import Decision, Ended, EpochOpened, Placed, TaskFailed, TaskState
from bus.port import Position, RecordValue
from bus.tensors import to_pieces
from bus.values import Execution, Kind, ModelProfile, Objective, Parts, Placement, Role
from loadgen.sim.virtual_loop import run_virtual
from stages.hops.edge_stage import EdgeStage
from stages.hops.hop import SWEEP_S, UNKNOWN_TASK_S, Hop, hop_of
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import ModelledRunner, Runner

CUT_BYTES = (100, 60, 8)
PROFILE = ModelProfile(
    model="toy", sha256="0" * 64, platform="p", layer_names=("a", "b"), layer_s=(0.01, 0.01), cut_bytes=CUT_BYTES
)


def plan(task_id: str = "t", **more: object) -> AttemptPlan:
    placement = Placement(
        kind=Kind.EDGE, edge="e", cut1=0, cut2=2, cut1_name="input", cut2_name="b", link1_bps=10_000_000
    )
    values = {
        "task_id": task_id,
        "attempt": 1,
        "region": 0,
        "device": "d",
        "model": "toy",
        "sha256": "0" * 64,
        "samples": 3,
        "todo": 3,
        "execution": Execution.STREAMING,
        "placement": placement,
    }
    return AttemptPlan.model_validate(values | more)


PLACED = Placed(
    task_id="t", attempt=1, device="d", model="toy", sha256="0" * 64, samples=3, policy="p", start_s=0.0, wait_s=0.0,
    objective=Objective.PIPELINED, execution=Execution.STREAMING, placement=plan().placement, delay_s=1.0, parts=Parts(),
)  # fmt: skip
PLACEMENT = Decision(region=0, epoch=1, nonce="n", seq=1, now_s=0.0, inputs={}, changes=(PLACED,), ledger_hash="h")


def frame(sample: int, *, task_id: str = "t", size: int = 100, with_plan: AttemptPlan | None = None) -> bytes:
    pieces = tuple(to_pieces(sample, [np.zeros(size, np.uint8)], 10_000))
    return encode_frame(Frame("activations", task_id, 1, "d", pieces, with_plan))


@dataclass
class Edge:
    """One edge on a bus, and a planner's pen."""

    bus: MemoryBus
    broker: MemoryBroker
    node: Node
    hop: Hop
    seq: int = 0
    letters: list[dict[str, str]] = field(default_factory=list)

    async def give(self, *frames: bytes, key: str = "t") -> None:
        for one in frames:
            await self.bus.send(topics.activations_topic("e"), one, key=key)

    async def decide(self, *changes: object) -> None:
        self.seq += 1
        decision = Decision(
            region=0, epoch=1, nonce="n", seq=self.seq, now_s=0.0, inputs={}, changes=changes, ledger_hash="h"
        )
        await self.bus.send(topics.DECISIONS, messages.encode(decision), key="0", partition=0)

    def read(self, topic: str) -> list[tuple[str | None, bytes, dict[str, str]]]:
        return [
            (record.key, record.value or b"", {name: content.decode() for name, content in record.headers})
            for log in self.broker.logs(topic)
            for record in log.read(0, log.end)
        ]

    def results(self) -> list[int]:
        frames = [decode_frame(value) for _, value, _ in self.read(topics.RESULTS)]
        return [piece.sample for one in frames if one.kind == "result" for piece in one.pieces]

    def failures(self) -> list[TaskFailed]:
        events = [messages.decode(topics.EVENTS, value) for _, value, _ in self.read(topics.EVENTS)]
        return [event for event in events if isinstance(event, TaskFailed)]

    def committed(self) -> int:
        return self.broker.committed("deepar.edge.e").get((topics.activations_topic("e"), 0), 0)


@contextlib.asynccontextmanager
async def edge(
    bus_type: type[MemoryBus] = MemoryBus, runner: Runner | None = None, slots: int = 1
) -> AsyncIterator[Edge]:
    broker = MemoryBroker()
    async with bus_type(broker) as bus:
        await bus.create_topics(topics.specs(["e"]))
        opened = EpochOpened(region=0, epoch=1, nonce="n", planner="p", lease_s=60.0)
        await bus.send(topics.DECISIONS, messages.encode(opened), key="0", partition=0)
        settings = NodeSettings(
            name="e", role=Role.EDGE, slots=slots, link1_capacity_bps=10_000_000, link2_capacity_bps=10_000_000
        )
        node = Node(bus, settings, runner or ModelledRunner([PROFILE]))
        hop = hop_of(node)
        task = asyncio.create_task(node.run(hop))
        await asyncio.sleep(1.0)
        yield Edge(bus, broker, node, hop)
        assert not task.done(), task
        task.cancel()
        await asyncio.wait([task])


def test_frames_that_come_twice_are_worked_on_once_and_all_offsets_are_committed() -> None:
    async def run() -> None:
        async with edge() as e:
            first = frame(0, with_plan=plan())
            await e.give(first, first, frame(1), frame(1), frame(0), frame(2), frame(2))
            await asyncio.sleep(2.0)
            assert e.results() == [0, 1, 2]
            assert e.node.status.counters["duplicates_suppressed"] == 4
            assert e.committed() == 7

    run_virtual(run())


def test_an_offset_is_not_committed_before_the_result_is_acknowledged() -> None:
    async def run() -> None:
        async with edge() as e:
            await e.give(frame(0, with_plan=plan()), frame(1))
            e.broker.latency_s = 1.0
            await asyncio.sleep(0.8)  # both are worked on, their results are on the way
            assert e.committed() == 0
            await asyncio.sleep(3.0)
            assert e.committed() == 2

    run_virtual(run())


def test_the_report_follows_the_last_result_without_waiting_for_its_acknowledgement() -> None:
    async def run() -> None:
        async with edge() as e:
            e.broker.latency_s = 1.0  # of a delivery and of an acknowledgement
            await e.give(frame(0, with_plan=plan(todo=1)))
            await asyncio.sleep(5.0)
            (log,) = [log for log in e.broker.logs(topics.RESULTS) if log.end]
            result, report = log.read(0, log.end)
            assert [decode_frame(one.value).kind for one in (result, report)] == ["result", "report"]
            assert report.timestamp_ms - result.timestamp_ms < 10

    run_virtual(run())


class FirstReportRefused(MemoryBus):
    """A bus that is unavailable for the first report."""

    refused = 0

    async def post(self, topic: str, value: RecordValue | None, **more: Any) -> Awaitable[Position]:
        if topic == topics.RESULTS and not self.refused and decode_frame(value).kind == "report":
            self.refused += 1
            raise BusUnavailableError("the broker is away")
        return await super().post(topic, value, **more)


def test_a_report_that_the_bus_refused_is_sent_again() -> None:
    async def run() -> None:
        async with edge(FirstReportRefused) as e:
            await e.give(frame(0, with_plan=plan(todo=1)))
            await asyncio.sleep(5.0)
            kinds = [decode_frame(value).kind for _, value, _ in e.read(topics.RESULTS)]
            assert kinds == ["result", "report"]

    run_virtual(run())


def test_the_owner_of_the_slot_is_not_blocked_by_ten_tasks_in_front_of_its_next_frame() -> None:
    async def run() -> None:
        async with edge() as e:
            await e.give(frame(0, with_plan=plan()))
            for number in range(10):
                name = f"w{number}"
                await e.give(frame(0, task_id=name, with_plan=plan(name)), key=name)
            await e.give(frame(1), frame(2))
            await asyncio.sleep(1.0)
            keys = [decode_frame(value).task_id for _, value, _ in e.read(topics.RESULTS)]
            assert keys[0] == "t"
            assert e.results()[:3] == [0, 1, 2]

    run_virtual(run())


def test_what_is_over_is_let_go_of_with_its_slot_and_its_offsets() -> None:
    async def run() -> None:
        async with edge() as e:
            await e.give(frame(0, with_plan=plan()), frame(1))
            await asyncio.sleep(1.0)
            assert isinstance(e.hop.stage, EdgeStage)
            assert e.hop.stage.slots._value == 0
            await e.decide(Ended(task_id="t", attempt=1, state=TaskState.FAILED, cause="cancelled"))
            await asyncio.sleep(1.0)
            assert (e.hop.flows, e.hop.stage.slots._value, e.committed()) == ({}, 1, 2)
            await e.give(frame(2))
            await asyncio.sleep(1.0)
            assert (e.hop.flows, e.committed()) == ({}, 3)
            assert e.node.status.counters["fenced_frames"] == 1

    run_virtual(run())


def test_a_task_that_nobody_knows_does_not_keep_the_slot_for_ever() -> None:
    async def run() -> None:
        async with edge() as e:
            await e.give(frame(0, with_plan=plan()))
            await asyncio.sleep(UNKNOWN_TASK_S + 2 * SWEEP_S)
            assert isinstance(e.hop.stage, EdgeStage)
            assert (e.hop.flows, e.hop.stage.slots._value, e.committed()) == ({}, 1, 1)

    run_virtual(run())


POISON = {
    "undecodable": b"\x80garbage",
    "unknown_version": b"\x82\xa1v\x63\xa4data\xc4\x00",
    "oversized": b"\x00" * 1_045_000,
    "wrong_shape": frame(1, size=99),
    "unknown_model": frame(0, task_id="u", with_plan=plan("u", model="nosuchnet")),
}


@pytest.mark.parametrize("cause", POISON)
def test_poison_is_dead_lettered_its_task_fails_with_the_cause_and_the_partition_goes_on(cause: str) -> None:
    async def run() -> None:
        async with edge() as e:
            e.node.fences.apply(PLACEMENT)
            key = "u" if cause == "unknown_model" else "t"
            await e.give(frame(0, with_plan=plan()))
            await e.give(POISON[cause], key=key)
            await e.give(*(frame(n, task_id="good", with_plan=plan("good")) for n in range(3)), key="good")
            await asyncio.sleep(3.0)
            ((origin, value, headers),) = e.read(topics.DEAD_LETTER)
            assert origin == "deepar.activations.e/0/1"
            assert value == POISON[cause][:1_000_000]
            assert (headers["deepar_cause"], headers["deepar_by"], headers["deepar_task"]) == (cause, "e", key)
            assert [(failed.task_id, failed.cause) for failed in e.failures()] == [(key, cause)]
            await e.decide(Ended(task_id="t", attempt=1, state=TaskState.FAILED, cause=cause))
            await asyncio.sleep(1.0)
            assert e.results()[-3:] == [0, 1, 2]
            assert e.committed() == 5

    run_virtual(run())


def test_a_model_of_the_same_name_with_other_bytes_is_not_computed_with() -> None:
    """Models are pinned: the plan says by which SHA-256 it was made."""

    async def run() -> None:
        async with edge() as e:
            other = plan("u", sha256="1" * 64)
            await e.give(frame(0, task_id="u", with_plan=other), key="u")
            await asyncio.sleep(1.0)
            ((_, _, headers),) = e.read(topics.DEAD_LETTER)
            assert (headers["deepar_cause"], headers["deepar_error"]) == (
                "unknown_model",
                "task u: SHA-256 of toy differs from the plan",
            )
            assert [(failed.task_id, failed.cause) for failed in e.failures()] == [("u", "unknown_model")]
            assert e.results() == []

    run_virtual(run())


def test_frames_without_a_plan_wait_and_are_dead_letters_in_the_end() -> None:
    async def run() -> None:
        async with edge() as e:
            await e.give(frame(1))
            await asyncio.sleep(UNKNOWN_TASK_S / 2)
            assert e.read(topics.DEAD_LETTER) == []
            await asyncio.sleep(UNKNOWN_TASK_S)
            ((_, _, headers),) = e.read(topics.DEAD_LETTER)
            assert headers["deepar_cause"] == "no_plan"
            assert e.committed() == 1

    run_virtual(run())


def test_waiting_for_a_slot_is_no_computing() -> None:
    """Two tasks at an edge with one slot: both compute for 3 x 20 ms, though one of them waits."""

    async def run() -> tuple[dict[str, float], float]:
        clock = asyncio.get_running_loop().time
        async with edge() as e:
            begin_s = clock()
            for sample in range(3):
                for task_id in ("t", "u"):
                    with_plan = plan(task_id) if sample == 0 else None
                    await e.give(frame(sample, task_id=task_id, with_plan=with_plan), key=task_id)
            reports: dict[str, float] = {}
            while len(reports) < 2:
                await asyncio.sleep(0.001)
                frames = [decode_frame(value) for _, value, _ in e.read(topics.RESULTS)]
                reports = {one.task_id: one.report["edge_s"] for one in frames if one.kind == "report"}
            return reports, clock() - begin_s

    reports, took_s = run_virtual(run())
    assert reports == {"t": pytest.approx(0.06), "u": pytest.approx(0.06)}
    assert 0.12 <= took_s < 0.14
