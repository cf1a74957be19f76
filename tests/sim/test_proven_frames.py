"""A region whose master demands that frames are proven, too: who speaks as another in a frame is as if he had not.

Each forgery is tried as well where frames are not proven, and does its harm there: so each of these tests can fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from bus import topics
from bus.frames import AttemptPlan, Frame, decode_frame, encode_frame
from bus.identity.keys import IDENTITY_HEADER, PROOF_HEADER, Master, Speaker
from bus.messages import HandleInput, SessionTerms, TaskState, TaskSubmitted
from bus.port import Record
from bus.tensors import Piece, to_pieces
from bus.values import Kind, Placement, Role
from deploy.commands.kafka.dead_letter import DeadLetter, read_dead_letters
from loadgen.replay.outcome import Outcome
from loadgen.sim.virtual_loop import run_virtual
from stages.devices.device import Device
from tests.sim.world import CUT_BYTES, World, WorldOptions, task, world

SECRET = bytes(range(32))
PLAIN, FRAMES = Master(SECRET), Master(SECRET, frames=True)
DATA_TOPICS = (topics.activations_topic("e1"), topics.ACTIVATIONS_CLOUD, topics.RESULTS)
SAMPLES = 200
TOPIC = topics.activations_topic("e1")


def _records(region: World, topic: str) -> list[Record]:
    return [
        Record(topic, number, record.offset, 0, record.key, record.value, record.headers)
        for number, log in enumerate(region.broker.logs(topic))
        for record in log.read(0, log.end)
    ]


def _refused(region: World) -> dict[str, int]:
    """Who has refused how many records."""
    found = {name: int(node.status.counters["wrong_identity"]) for name, node in region.nodes.items()}
    return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("policy", ["deepar", "edge-only", "cloud-only"])
def test_every_frame_is_proven_and_nobody_honest_is_refused(policy: str) -> None:
    async def run() -> World:
        async with world(
            WorldOptions(master=FRAMES, policy=policy, link1_bps=4_000_000, link2_bps=4_000_000)
        ) as region:
            outcomes = await region.replay([task(n, f"d{n % 3 + 1}") for n in range(12)])
            assert {outcome.state for outcome in outcomes.values()} == {TaskState.COMPLETED}
            assert await read_dead_letters(region.bus) == []
            return region

    region = run_virtual(run())
    assert sorted(region.shown) == sorted((f"t{n}", sample) for n in range(12) for sample in range(10))
    assert _refused(region) == {}
    records = [record for topic in DATA_TOPICS for record in _records(region, topic)]
    assert records
    for record in records:
        assert {IDENTITY_HEADER, PROOF_HEADER} <= {name for name, _ in record.headers}
    if policy == "cloud-only":
        assert {record.topic for record in records} == {*DATA_TOPICS}
        assert any(piece.at for record in records for piece in decode_frame(record.value).pieces)  # in several frames


@pytest.mark.parametrize("tiers", [(Role.EDGE,), (Role.CLOUD,)], ids=["edge", "cloud"])
def test_the_frames_of_a_session_are_proven_too(tiers: tuple[Role, ...]) -> None:
    async def run() -> World:
        async with world(WorldOptions(master=FRAMES)) as region:
            device = region.works["d1"]
            assert isinstance(device, Device)
            session = device.open_session(
                TaskSubmitted(
                    task_id="s",
                    device="d1",
                    model="toy",
                    samples=1,
                    input=HandleInput(handle="s"),
                    session=SessionTerms(rate_hz=5.0),
                    tiers=tiers,
                )
            )
            for _ in range(40):
                await session.push([np.zeros(CUT_BYTES[0], np.uint8)])
                await asyncio.sleep(0.2)
            await session.close()
            await asyncio.sleep(1.0)
            assert await read_dead_letters(region.bus) == []
            return region

    region = run_virtual(run())
    assert _refused(region) == {}
    records = [record for topic in DATA_TOPICS for record in _records(region, topic)]
    assert len(records) >= 80
    for record in records:
        assert {IDENTITY_HEADER, PROOF_HEADER} <= {name for name, _ in record.headers}


def test_frames_carry_no_proof_where_none_is_demanded() -> None:
    async def run() -> World:
        async with world(WorldOptions(master=PLAIN)) as region:
            await region.replay([task(n, f"d{n % 3 + 1}") for n in range(6)])
            return region

    region = run_virtual(run())
    for topic in DATA_TOPICS:
        assert not any(name == PROOF_HEADER for record in _records(region, topic) for name, _ in record.headers)


# --- forgeries, while a task of d1 runs through e1 -------------------------------------------------------------------


async def _running(region: World, task_id: str) -> AttemptPlan:
    """The plan of a task of d1 of which some results are there and most are not."""
    device = region.works["d1"]
    assert isinstance(device, Device)
    while True:
        known = device.tasks.get(task_id)
        if known is not None and known.attempt is not None and len(known.results) > 3:
            return known.attempt.plan
        await asyncio.sleep(0.01)


def _frame(kind: str, plan: AttemptPlan, source: str, pieces: list[Piece], told: AttemptPlan | None = None) -> bytes:
    return encode_frame(Frame(kind, plan.task_id, plan.attempt, source, tuple(pieces), told))  # type: ignore[arg-type]


def _forged_output(plan: AttemptPlan) -> list[Piece]:
    return to_pieces(plan.samples - 1, [np.ones(CUT_BYTES[-1], np.uint8)], 10_000)


async def result_of_another_edge(region: World, plan: AttemptPlan) -> None:
    """An edge that was taken over shows d1 results of its own making, in e1's name or its own."""
    bus = region.bus_of("edge", "e2")
    for source in ("e1", "e2"):
        await bus.send(topics.RESULTS, _frame("result", plan, source, _forged_output(plan)), key="d1")


async def result_of_nobody(region: World, plan: AttemptPlan) -> None:
    """Somebody who may write on the topic and has no key."""
    await region.bus.send(topics.RESULTS, _frame("result", plan, "e1", _forged_output(plan)), key="d1")


async def activations_of_another_device(region: World, plan: AttemptPlan) -> None:
    """d2 sends e1 what breaks d1's task: too short a sample, in d1's name or its own."""
    bus = region.bus_of("device", "d2")
    for source in ("d1", "d2"):
        pieces = to_pieces(plan.samples - 1, [np.ones(1, np.uint8)], 10_000)
        await bus.send(TOPIC, _frame("activations", plan, source, pieces), key=plan.task_id)


async def garbage_under_its_name(region: World, plan: AttemptPlan) -> None:
    """d2, with a valid proof of its own name, sends unreadable frames under the key of d1's task."""
    await region.bus_of("device", "d2").send(TOPIC, b"{", key=plan.task_id)


async def garbage_of_another_kind(region: World, plan: AttemptPlan) -> None:
    """d2 sends a frame of d1's task that is none for an edge, under the key of its own."""
    await region.bus_of("device", "d2").send(TOPIC, _frame("result", plan, "d2", _forged_output(plan)), key="t77")


async def activations_of_a_device_for_the_cloud(region: World, plan: AttemptPlan) -> None:
    """e2 sends the cloud what breaks d1's task."""
    pieces = to_pieces(plan.samples - 1, [np.ones(1, np.uint8)], 10_000)
    frame = _frame("activations", plan, "e2", pieces, plan)
    await region.bus_of("edge", "e2").send(topics.ACTIVATIONS_CLOUD, frame, key=plan.task_id)


async def _under(
    master: Master, forge: Callable[[World, AttemptPlan], Awaitable[None]]
) -> tuple[Outcome, World, list[DeadLetter]]:
    async with world(WorldOptions(master=master, edges=("e1",), policy="cloud-only")) as region:
        playing = asyncio.create_task(region.replay([task(0, samples=SAMPLES)]))
        await forge(region, await _running(region, "t0"))
        outcome = (await playing)["t0"]
        await asyncio.sleep(1.0)
        return outcome, region, await read_dead_letters(region.bus)


FORGERIES: dict[Callable[[World, AttemptPlan], Awaitable[None]], tuple[str, int]] = {
    result_of_another_edge: ("d1", 2),
    result_of_nobody: ("d1", 1),
    activations_of_another_device: ("e1", 2),
    activations_of_a_device_for_the_cloud: ("c1", 1),
    garbage_of_another_kind: ("e1", 1),
}
"""Who refuses it, and how many records."""


def _harmed(outcome: Outcome, region: World) -> bool:
    return outcome.state != "COMPLETED" or any(region.outputs["t0", SAMPLES - 1][0])


@pytest.mark.parametrize("forge", [*FORGERIES, garbage_under_its_name], ids=lambda forge: forge.__name__)
def test_what_is_forged_is_refused_and_seen_and_harms_nobody(
    forge: Callable[[World, AttemptPlan], Awaitable[None]],
) -> None:
    outcome, region, letters = run_virtual(_under(FRAMES, forge))
    assert not _harmed(outcome, region)
    assert sorted(sample for _, sample in region.shown) == list(range(SAMPLES))
    if forge in FORGERIES:
        who, count = FORGERIES[forge]
        assert _refused(region) == {who: count}
        assert [(letter.by, letter.cause) for letter in letters] == [(who, "wrong_identity")] * count
    else:  # d2 has said who it is; it just makes no sense
        assert [(letter.by, letter.cause) for letter in letters] == [("e1", "undecodable")]


@pytest.mark.parametrize("forge", [*FORGERIES, garbage_under_its_name], ids=lambda forge: forge.__name__)
def test_where_frames_are_not_proven_the_same_does_harm(forge: Callable[[World, AttemptPlan], Awaitable[None]]) -> None:
    outcome, region, _ = run_virtual(_under(PLAIN, forge))
    assert _harmed(outcome, region)
    assert _refused(region) == {}


def test_what_was_changed_on_its_way_is_refused() -> None:
    """One bit of a frame, its key, its topic, and proofs that are borrowed."""
    e1, d1 = FRAMES.key(Speaker("edge", "e1")), FRAMES.key(Speaker("device", "d1"))
    assert e1.frames is not None
    assert d1.frames is not None
    value = bytes(1000)
    headers = e1.frames.headers(topics.RESULTS, "d1", value)
    good = Record(topics.RESULTS, 0, 7, 0, "d1", value, headers)
    assert d1.frames.sender(good) == Speaker("edge", "e1")
    named = ((IDENTITY_HEADER, b"edge:e2"), headers[1])
    borrowed = e1.frames.headers(topics.ACTIVATIONS_CLOUD, "d1", value)
    for changed in (
        Record(topics.RESULTS, 0, 7, 0, "d1", value[:-1] + b"\1", headers),
        Record(topics.RESULTS, 0, 7, 0, "d2", value, headers),
        Record(topics.RESULTS, 0, 7, 0, None, b"d1" + value, headers),
        Record(topics.RESULTS, 0, 7, 0, "d1", None, headers),
        Record(topics.RESULTS, 0, 7, 0, "d1", value, named),
        Record(topics.RESULTS, 0, 7, 0, "d1", value, borrowed),
        Record(topics.RESULTS, 0, 7, 0, "d1", value, headers[:1]),
        Record(topics.RESULTS, 0, 7, 0, "d1", value, (*headers, *headers)),
        Record(topics.RESULTS, 0, 7, 0, "d1", value, PLAIN.key(e1.speaker).headers(topics.RESULTS, 0, "d1", value)),
    ):
        with pytest.raises(Exception, match=r"the proof is not that of|is not signed") as caught:
            d1.frames.sender(changed)
        assert getattr(caught.value, "cause", None) == "wrong_identity"


# --- before a task is decided ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("region_number", [0, 7])
def test_nobody_takes_a_task_s_name_before_it_is_decided(region_number: int) -> None:
    """d2 and e2 know the next task's name and send plans for it, to edge and cloud: in this region, or as of another."""

    async def run() -> World:
        async with world(WorldOptions(master=FRAMES, edges=("e1",), policy="cloud-only")) as region:
            placement = Placement(
                kind=Kind.CLOUD, edge="e1", cut1=0, cut2=0, cut1_name="input", cut2_name="input",
                link1_bps=1_000_000, link2_bps=1_000_000,
            )  # fmt: skip
            plan = AttemptPlan(
                task_id="t0", attempt=1, region=region_number, device="d2", model="toy", sha256="0" * 64, samples=5,
                todo=5, execution="streaming", placement=placement,
            )  # fmt: skip
            pieces = to_pieces(0, [np.ones(CUT_BYTES[0], np.uint8)], CUT_BYTES[0])
            of_e2 = plan.model_copy(update={"placement": placement.model_copy(update={"edge": "e2"})})
            await region.bus_of("device", "d2").send(TOPIC, _frame("activations", plan, "d2", pieces, plan), key="t0")
            await region.bus_of("edge", "e2").send(
                topics.ACTIVATIONS_CLOUD, _frame("activations", of_e2, "e2", pieces, of_e2), key="t0"
            )
            await asyncio.sleep(1.0)
            outcomes = await region.replay([task(0, samples=SAMPLES)])
            assert outcomes["t0"].state == "COMPLETED"
            assert region.nodes["d1"].status.counters["stalled_attempts"] == 0  # at once, not in a second attempt
            await asyncio.sleep(1.0)
            return region

    region = run_virtual(run())
    assert sorted(region.shown) == [("t0", sample) for sample in range(SAMPLES)]
    expected = {"e1": 1, "c1": 1} if region_number == 0 else {"e1": 1}  # of another region: believed, and let go of
    assert _refused(region) == expected


def test_a_device_that_makes_its_own_plan_is_refused() -> None:
    """More of link 2 than was granted, say."""

    async def run() -> tuple[World, list[DeadLetter], Outcome]:
        async with world(WorldOptions(master=FRAMES, edges=("e1",), policy="cloud-only")) as region:
            playing = asyncio.create_task(region.replay([task(0, samples=SAMPLES)]))
            plan = await _running(region, "t0")
            more = plan.placement.model_copy(update={"link2_bps": 10 * plan.placement.link2_bps})
            told = plan.model_copy(update={"placement": more})
            await region.bus_of("device", "d1").send(TOPIC, _frame("activations", plan, "d1", [], told), key="t0")
            outcome = (await playing)["t0"]
            return region, await read_dead_letters(region.bus), outcome

    region, letters, outcome = run_virtual(run())
    assert _refused(region) == {"e1": 1}
    assert [letter.error for letter in letters] == [
        "device:d1 sent a plan for t0 that differs from the planner's decision"
    ]
    assert outcome.state == "COMPLETED"
