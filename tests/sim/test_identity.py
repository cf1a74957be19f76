"""A region that demands proofs of identity, in virtual time: one device speaks as another, and it is as if it had not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import structlog

from bus import messages, topics
from bus.errors import ConfigError, ProtocolError
from bus.identity import IDENTITY_HEADER, Key, Master, Speaker
from bus.messages import (
    Decision,
    Message,
    NodeAnnounced,
    NodeHeartbeat,
    NodeJoined,
    NodeLeft,
    NodeLost,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskState,
)
from bus.port import Bus, Headers, Record
from bus.signed import signed
from bus.values import Parts, Role
from deploy.commands_deadletter import Letter, read_letters
from deploy.nodes import planner_counters
from loadgen import chaos, chaos_region
from loadgen.replay import replay
from loadgen.schedule import Entry, Schedule
from loadgen.virtual_loop import run_virtual
from planner import doorkeeper
from planner.core import PlannerCore
from planner.doorkeeper import Doorkeeper
from planner.service import PlannerService, Standing
from stages.node import Node, NodeSettings
from stages.runner import ModelledRunner, Runner
from tests.decision_story import Story
from tests.sim.planners import Town, town
from tests.sim.world import profile, task

MASTER = Master(bytes(range(32)))
HORIZON_S = 3600.0
TASKS = 6
IDS = {f"t{number}" for number in range(TASKS)}


async def _leading(place: Town) -> None:
    while not any(one.service.standing is Standing.LEADING for one in place.processes):
        await asyncio.sleep(0.1)


async def _joined(place: Town) -> None:
    while len(place.nodes) < 6 or not all(node.status.joined for node in place.nodes.values()):
        await asyncio.sleep(0.1)


async def _letters(place: Town) -> list[Letter]:
    return [letter for letter in await read_letters(place.bus) if letter.cause == "wrong_identity"]


def _lost(story: Story) -> list[str]:
    return [change.node for d in story.decisions for change in d.changes if isinstance(change, NodeLost)]


def test_a_region_that_demands_proofs_works_with_real_stages_and_refuses_nobody() -> None:
    async def run() -> tuple[Story, list[Letter], int]:
        async with town(real=True, master=MASTER) as place:
            process = place.start("only")
            await place.submit(range(TASKS))
            story = await place.until_ended(TASKS)
            await asyncio.sleep(60.0)  # of heartbeats
            return story, await _letters(place), process.service.door.refused

    story, letters, refused = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert {state for states in story.ends.values() for state in states} == {TaskState.COMPLETED}
    assert (letters, refused) == ([], 0)
    assert [opened.identity for opened in story.opened] == [MASTER.fingerprint]


# --- d1 speaks as another -------------------------------------------------------------------------------------------

FORGERIES: dict[str, tuple[str, Message, str]] = {
    "announcement": (
        topics.NODES,
        NodeAnnounced(node="d2", role=Role.DEVICE, incarnation="forged", models=(profile(Role.DEVICE),)),
        "device:d1 speaks as d2 in a node_announced",
    ),
    "announcement as an edge": (
        topics.NODES,
        NodeAnnounced(node="d1", role=Role.EDGE, incarnation="forged", slots=9, models=(profile(Role.EDGE),)),
        "device:d1 announces itself as edge",
    ),
    "farewell": (topics.NODES, NodeLeft(node="d2", incarnation="d2-1"), "device:d1 speaks as d2 in a node_left"),
    "heartbeat": (
        topics.EVENTS,
        NodeHeartbeat(node="d2", incarnation="d2-1"),
        "device:d1 speaks as d2 in a node_heartbeat",
    ),
    "completion": (
        topics.EVENTS,
        TaskCompleted(task_id="t0", attempt=1, node="d2", measured=Parts(), delay_s=0.1),
        "device:d1 speaks as d2 in a task_completed",
    ),
    "failure": (
        topics.EVENTS,
        TaskFailed(task_id="t0", attempt=1, node="d2", cause="bad_frame"),
        "device:d1 speaks as d2 in a task_failed",
    ),
    "failure in its own name": (
        topics.EVENTS,
        TaskFailed(task_id="t0", attempt=1, node="d1", cause="bad_frame"),
        "device:d1 sends a task_failed of t0, in which it has no part",
    ),
    "cancellation": (
        topics.TASKS,
        TaskCancelled(task_id="t0"),
        "device:d1 sends a task_cancelled of t0, in which it has no part",
    ),
    "submission": (topics.TASKS, task(77, "d2"), "device:d1 speaks as d2 in a task_submitted"),
}


async def _forged(forgery: str, master: Master | None) -> tuple[Story, Story, list[Letter], int]:
    """While a task of d2 runs, d1 says something in its place; then d2 goes on. The story before that, and in the end."""
    topic, message, _ = FORGERIES[forgery]
    async with town(master=master) as place:
        process = place.start("only")
        await _leading(place)
        playing = [one for one in asyncio.all_tasks() if one.get_name() == "stages"]
        playing[0].cancel()  # t0 is d2's, and nobody ends it
        await place.tell(topics.TASKS, task(0, "d2"), "t0")
        await asyncio.sleep(1.0)
        key = "t0" if getattr(message, "task_id", None) == "t0" else getattr(message, "node", "t77")
        await place.tell(topic, message, key, "device:d1")
        await asyncio.sleep(2.0)
        done = TaskCompleted(task_id="t0", attempt=1, node="d2", measured=Parts(), delay_s=3.0)
        before = await place.story()
        await place.tell(topics.EVENTS, done, "t0", "device:d2")
        await asyncio.sleep(2.0)
        counted = planner_counters([process.service])["wrong_identity"]  # as /metrics tells it
        return before, await place.story(), await _letters(place), int(counted)


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_a_device_says_as_another_is_refused_and_seen_and_disturbs_nobody(forgery: str) -> None:
    before, story, letters, refused = run_virtual(_forged(forgery, MASTER), horizon_s=HORIZON_S)
    assert before.ends == {}  # t0 is still d2's
    assert [letter.error for letter in letters] == [FORGERIES[forgery][2]]
    assert letters[0].topic == FORGERIES[forgery][0]
    assert messages.decode(letters[0].topic, letters[0].value) == FORGERIES[forgery][1]
    assert refused == 1
    assert story.ends == {"t0": [TaskState.COMPLETED]}
    assert _lost(story) == []
    # It counts as read, so no planner looks at it again.
    assert story.decisions[-1].inputs[letters[0].topic] > letters[0].offset


@pytest.mark.parametrize("forgery", sorted(FORGERIES.keys() - {"heartbeat"}))
def test_without_a_master_the_same_is_believed(forgery: str) -> None:
    """So each of them does harm where it is not refused: the test above can fail."""
    before, story, letters, _ = run_virtual(_forged(forgery, None), horizon_s=HORIZON_S)
    assert letters == []
    ended = before.ends.get("t0")  # what d2 says of it comes later
    believed: dict[str, Callable[[], bool]] = {
        "completion": lambda: ended == [TaskState.COMPLETED],
        "submission": lambda: "t77" in story.admitted,
        "announcement": lambda: _lost(story) == ["d2"],
        "announcement as an edge": lambda: _lost(story) == ["d1"],
        "farewell": lambda: _lost(story) == ["d2"],
    }
    assert believed.get(forgery, lambda: ended == [TaskState.FAILED])()


def test_a_name_without_its_key_is_worth_nothing() -> None:
    """d1 calls itself d2: with its own key, with a key of its own making, with another record's proof, with none."""
    farewell = messages.encode(NodeLeft(node="d2", incarnation="d2-1"))
    d1, d2 = Speaker("device", "d1"), Speaker("device", "d2")
    of_d1 = MASTER.key(d1).headers(topics.NODES, 0, "d2", farewell)
    of_another_record = MASTER.key(d2).headers(topics.EVENTS, 0, "d2", farewell)
    tried: list[Headers] = [
        ((IDENTITY_HEADER, b"device:d2"), of_d1[1]),
        Key(d2, MASTER.fingerprint, MASTER.key(d1).secret).headers(topics.NODES, 0, "d2", farewell),
        of_another_record,
        ((IDENTITY_HEADER, b"device:d2"),),
        (),
    ]

    async def run() -> tuple[Story, list[Letter]]:
        async with town(master=MASTER) as place:
            place.start("only")
            await _leading(place)
            for headers in tried:
                await place.bus.send(topics.NODES, farewell, key="d2", partition=0, headers=headers)
            await place.submit(range(TASKS))
            return await place.until_ended(TASKS), await _letters(place)

    story, letters = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert _lost(story) == []
    assert [letter.error for letter in letters] == [
        *["the proof is not that of device:d2"] * 3,
        "no header deepar_proof: nobody answers for this record",
        "no header deepar_identity: nobody answers for this record",
    ]


def test_a_forged_heartbeat_does_not_keep_a_dead_node_alive() -> None:
    async def run(master: Master | None) -> list[str]:
        async with town(master=master) as place:
            await place.announce(lease_s=4.0)
            place.start("only")
            for _ in range(20):
                for node, role in (("c1", "cloud"), ("e1", "edge"), ("e2", "edge"), ("d1", "device"), ("d3", "device")):
                    await place.tell(
                        topics.EVENTS, NodeHeartbeat(node=node, incarnation=f"{node}-1"), node, f"{role}:{node}"
                    )
                await place.tell(topics.EVENTS, NodeHeartbeat(node="d2", incarnation="d2-1"), "d2", "device:d1")
                await asyncio.sleep(1.0)
            return _lost(await place.story())

    assert run_virtual(run(None), horizon_s=HORIZON_S) == []
    assert run_virtual(run(MASTER), horizon_s=HORIZON_S) == ["d2"]


async def _told(master: Master | None, started: str) -> tuple[str, list[str]]:
    """What a device fails of that can prove nothing, and what the region refused of it."""
    async with town(master=MASTER) as place:
        if started == "before the planner":
            starting = asyncio.create_task(_start(place, master))
            await asyncio.sleep(2.0)
        place.start("only", snapshot_every=2)
        await _leading(place)
        if started == "behind a snapshot":
            await place.submit(range(4))
            await place.until_ended(4)
            await asyncio.sleep(1.0)
            assert (await place.bus.end_offsets(topics.SNAPSHOTS))[0] > 0
        if started != "before the planner":
            starting = asyncio.create_task(_start(place, master))
        clock = asyncio.get_running_loop().time
        began_s = clock()
        await asyncio.wait({starting})
        assert clock() - began_s < 5.0
        found: BaseException | None = starting.exception()
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        assert isinstance(found, ConfigError)
        await asyncio.sleep(1.0)
        return str(found), [letter.error for letter in await _letters(place)]


def test_a_node_with_no_key_or_a_key_of_another_master_is_told_at_once() -> None:
    for started in ("after the planner", "behind a snapshot"):
        told, refused = run_virtual(_told(None, started), horizon_s=HORIZON_S)
        assert "device d1 has no key" in told
        assert refused == []  # it said nothing
    other = Master(bytes(32))
    told, refused = run_virtual(_told(other, "after the planner"), horizon_s=HORIZON_S)
    assert f"that of device:d1 is of {other.fingerprint}" in told
    assert refused == []


@pytest.mark.parametrize("end", ["left", "killed"])
def test_a_node_with_a_new_key_waits_for_the_planner_that_knows_it(end: str) -> None:
    """A region changes its master: node and planner start at once, behind a log that demands the old one."""

    async def run() -> tuple[bool, list[str]]:
        async with town(master=MASTER) as place:
            old = place.start("old", snapshot_every=2)
            await place.submit(range(4))
            await place.until_ended(4)
            await (old.stop() if end == "left" else old.kill())
            fresh = Master(bytes(32))
            starting = asyncio.create_task(_start(place, fresh))
            await asyncio.sleep(0.5)
            assert not starting.done()
            place.start("new", master=fresh)
            await asyncio.sleep(5.0)
            assert not starting.done()
            joined = [
                change.node.node
                for decision in (await place.story()).decisions
                for change in decision.changes
                if isinstance(change, NodeJoined) and len(change.node.incarnation) == 12  # a real node's
            ]
            starting.cancel()
            await asyncio.wait({starting})
            return joined == ["d1"], [letter.error for letter in await _letters(place) if "d1" in letter.error]

    assert run_virtual(run(), horizon_s=HORIZON_S) == (True, [])


def test_a_node_hears_of_a_demand_that_is_new() -> None:
    told, refused = run_virtual(_told(None, "before the planner"), horizon_s=HORIZON_S)
    assert "device d1 has no key" in told
    assert refused  # what it had said before
    assert all("nobody answers for this record" in error for error in refused)


async def _start(place: Town, master: Master | None) -> None:
    bus = Town(place.broker, place.bus, master=master).bus_of("device:d1")
    node = Node(bus, NodeSettings(name="d1", role=Role.DEVICE), ModelledRunner([profile(Role.DEVICE)]))

    class Idle:
        async def run(self) -> None:
            node.serving.set()
            await asyncio.get_running_loop().create_future()

        def on_decision(self, decision: Decision, fenced: Any) -> None: ...

        def on_lost(self) -> None: ...

    await node.run(Idle())


def test_a_replay_without_a_key_is_told_before_it_submits() -> None:
    async def run() -> int:
        async with town(master=MASTER) as place:
            place.start("only")
            await _leading(place)
            with pytest.raises(ConfigError, match="has no key"):
                await replay(place.bus, Schedule(entries=(Entry(at_s=0.0, task=task(1)),)), drain_timeout_s=5.0)
            result = await replay(
                place.bus_of("loadgen:x"), Schedule(entries=(Entry(at_s=0.0, task=task(1)),)), drain_timeout_s=5.0
            )
            assert [outcome.state for outcome in result.outcomes] == ["COMPLETED"]
            return (await place.bus.end_offsets(topics.TASKS))[0]

    assert run_virtual(run(), horizon_s=HORIZON_S) == 1


# --- planners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_planners_that_are_killed_among_forgeries_come_back_to_the_same_state(seed: int) -> None:
    """Whoever folds the decisions, with the master or without, arrives at the same hash."""
    random = Random(seed)

    async def run() -> tuple[Story, str, list[Letter]]:
        async with town(real=True, master=MASTER) as place:

            async def forge() -> None:
                while True:
                    topic, message, _ = FORGERIES[random.choice(sorted(FORGERIES))]
                    await place.tell(topic, message, "x", "device:d3")
                    await asyncio.sleep(random.uniform(0.0, 0.5))

            forging = asyncio.create_task(forge())
            submitting = asyncio.create_task(place.submit(range(TASKS), gap_s=0.5))
            for number in range(6):
                process = place.start(f"p{number}", fuse=random.randrange(20, 120), snapshot_every=5)
                died = asyncio.create_task(process.bus.died.wait())
                await asyncio.wait({died, process.task}, return_when=asyncio.FIRST_COMPLETED)
                await process.stop()
            last = place.start("last")
            await submitting
            story = await place.until_ended(TASKS)
            forging.cancel()
            await asyncio.sleep(5.0)
            story = await place.story()  # folds with no master, and compares every hash
            return story, last.service.core.state_hash, await _letters(place)

    story, ended_with, letters = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert {state for states in story.ends.values() for state in states} == {TaskState.COMPLETED}
    assert story.core.state_hash == ended_with
    assert len(letters) > 10
    assert _lost(story) == []


def test_a_planner_without_the_master_does_not_make_a_safe_region_unsafe() -> None:
    async def run(first_ends: bool, **more: Any) -> tuple[BaseException | None, list[str | None]]:
        async with town(master=MASTER) as place:
            first = place.start("first", snapshot_every=2)
            await place.submit(range(4))
            await place.until_ended(4)
            if first_ends:
                await first.stop()
            second = place.start("second", master=None, **more)
            await asyncio.wait({second.task}, timeout=10.0)
            place.processes.remove(second)  # what it fails of is looked at here
            opened = [opened.identity for opened in (await place.story()).opened]
            if second.task.done():
                return second.task.exception(), opened
            await second.stop()
            return None, opened

    demanded = MASTER.fingerprint
    for first_ends in (True, False):
        failed, opened = run_virtual(run(first_ends), horizon_s=HORIZON_S)
        assert isinstance(failed, ConfigError)
        assert "--trust-everybody" in str(failed.remedy)
        assert opened == [demanded]
    failed, opened = run_virtual(run(True, trust_everybody=True), horizon_s=HORIZON_S)
    assert failed is None
    assert opened == [demanded, None]


def test_a_flood_of_forgeries_is_counted_and_does_not_hold_up_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorkeeper, "LETTERS_AT_ONCE", 10)

    async def run() -> tuple[Story, int, int, int]:
        async with town(master=MASTER) as place:
            process = place.start("only")
            await _leading(place)
            process.service.door._letters = 10.0
            beat = NodeHeartbeat(node="d2", incarnation="d2-1")
            for _ in range(500):
                await place.tell(topics.EVENTS, beat, "d2", "device:d1")
            await place.submit(range(TASKS))
            story = await place.until_ended(TASKS)
            door = process.service.door
            return story, door.refused, door.unkept, len(await _letters(place))

    story, refused, unkept, letters = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert refused == 500
    assert 10 <= letters < 30
    assert letters + unkept == refused


def test_no_secret_is_in_a_log_or_a_dead_letter() -> None:
    """Neither the master, nor a key, nor a proof, nor what else a record's headers held."""
    key = MASTER.key(Speaker("device", "d1"))
    beat = messages.encode(NodeHeartbeat(node="d2", incarnation="d2-1"))
    planted = (("authorization", b"planted-0xC0FFEE"), ("deepar_cause", b"planted-0xC0FFEE"))
    proof = key.headers(topics.EVENTS, 0, "d2", beat)

    async def run() -> tuple[str, int]:
        async with town(real=True, master=MASTER) as place:
            place.start("only", snapshot_every=2)
            await place.submit(range(TASKS))
            for headers in (proof, proof[:1], (), (*proof, *proof)):
                await place.bus.send(topics.EVENTS, beat, key="d2", partition=0, headers=(*headers, *planted))
            for topic in topics.CLAIMED_TOPICS:
                await place.bus.send(topic, b"{", key="d2", partition=0, headers=planted)
                await place.bus_of("device:d1").send(topic, b"{", key="d2", partition=0, headers=planted)
            await place.until_ended(TASKS)
            kept = ""
            names = [spec.name for spec in topics.specs() if spec.name not in topics.CLAIMED_TOPICS]
            for name in names:
                for log in place.broker.logs(name):
                    kept += repr(log.read(0, log.end))
            return kept, len(await read_letters(place.bus))

    with structlog.testing.capture_logs() as logged:
        kept, letters = run_virtual(run(), horizon_s=HORIZON_S)
    assert letters == 10
    assert len([line for line in logged if line["event"] == "not obeyed"]) == 7
    told = repr(logged) + kept
    assert "wrong_identity" in told
    for secret in (bytes(range(32)), key.secret, proof[1][1], b"planted-0xC0FFEE"):
        assert secret.hex() not in told
        assert repr(secret)[2:-1] not in told


# --- among faults ----------------------------------------------------------------------------------------------------


def test_among_faults_nobody_honest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepar simulate chaos` where the region demands proofs: the same guarantees hold, and only the poison is refused."""
    said: list[str] = []
    read = Doorkeeper.read

    def listening(door: Doorkeeper, record: Record, core: PlannerCore) -> Any:
        try:
            return read(door, record, core)
        except ProtocolError as error:
            said.append(str(error))
            raise

    def proving(bus: Bus, settings: NodeSettings, runner: Runner) -> Node:
        return Node(signed(bus, MASTER.key(Speaker(settings.role.value, settings.name))), settings, runner)

    submit = chaos._Chaos._submit

    async def submitting(run: Any, client: Bus) -> None:
        await submit(run, signed(client, MASTER.key(Speaker("loadgen", "chaos"))))  # type: ignore[arg-type]

    monkeypatch.setattr(Doorkeeper, "read", listening)
    monkeypatch.setattr(chaos_region, "Node", proving)
    monkeypatch.setattr(chaos, "PlannerService", partial(PlannerService, master=MASTER))
    monkeypatch.setattr(chaos._Chaos, "_submit", submitting)
    found = chaos.run(range(12))
    assert found["violations"] == []
    assert found["retries"] > 0
    assert found["states"]["COMPLETED"] > 80
    # Poison on the control topics has no proof; on an edge's topic it may name a task that is not that edge's.
    assert said
    assert all("nobody answers for this record" in why or "in which it has no part" in why for why in said), said


# --- what a node may announce ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("master", [None, MASTER], ids=["trusting", "demanding"])
def test_an_announcement_too_large_for_a_decision_is_refused_and_the_planner_goes_on(master: Master | None) -> None:
    """It can be read, and the record that would take the node in could not: nobody may end a planner with that."""
    many = tuple(f"edge-{number}" for number in range(10_000, 86_900))
    announced = NodeAnnounced(node="d9", role=Role.DEVICE, incarnation="d9-1", reachable_edges=many)
    assert len(messages.encode(announced)) < messages.MAX_MESSAGE_BYTES

    async def run() -> tuple[Story, list[str]]:
        async with town(master=master) as place:
            process = place.start("only")
            await place.tell(topics.NODES, announced, "d9", "device:d9")
            await place.submit(range(TASKS))
            story = await place.until_ended(TASKS)
            assert not process.task.done()
            return story, [letter.cause for letter in await read_letters(place.bus)]

    story, causes = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert causes == ["oversized"]
