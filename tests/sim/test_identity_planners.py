"""Planners of a region that demands proofs: what they remember, refuse and keep to themselves; virtual time."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest
import structlog

from bus import messages, topics
from bus.errors import ConfigError
from bus.identity.keys import Master, Speaker
from bus.messages import (
    NodeAnnounced,
    NodeHeartbeat,
    TaskState,
)
from bus.values import Role
from deploy.commands.kafka.dead_letter import DeadLetter, read_dead_letters
from loadgen.sim.virtual_loop import run_virtual
from tests.decision_story import Story
from tests.sim.forgeries import FORGERIES, HORIZON_S, IDS, MASTER, TASKS, dead_letters_of, lost_in
from tests.sim.planners import town


@pytest.mark.parametrize("seed", range(3))
def test_planners_that_are_killed_among_forgeries_come_back_to_the_same_state(seed: int) -> None:
    """Folding the decisions gives the same hash with the master and without it."""
    random = Random(seed)

    async def run() -> tuple[Story, str, list[DeadLetter]]:
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
            return story, last.service.core.state_hash, await dead_letters_of(place)

    story, ended_with, letters = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert {state for states in story.ends.values() for state in states} == {TaskState.COMPLETED}
    assert story.core.state_hash == ended_with
    assert len(letters) > 10
    assert lost_in(story) == []


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
            for topic in topics.SIGNED_TOPICS:
                await place.bus.send(topic, b"{", key="d2", partition=0, headers=planted)
                await place.bus_of("device:d1").send(topic, b"{", key="d2", partition=0, headers=planted)
            await place.until_ended(TASKS)
            kept = ""
            names = [spec.name for spec in topics.specs() if spec.name not in topics.SIGNED_TOPICS]
            for name in names:
                for log in place.broker.logs(name):
                    kept += repr(log.read(0, log.end))
            return kept, len(await read_dead_letters(place.bus))

    with structlog.testing.capture_logs() as logged:
        kept, letters = run_virtual(run(), horizon_s=HORIZON_S)
    assert letters == 10
    assert len([line for line in logged if line["event"] == "record rejected: unauthorized"]) == 7
    told = repr(logged) + kept
    assert "wrong_identity" in told
    for secret in (bytes(range(32)), key.secret, proof[1][1], b"planted-0xC0FFEE"):
        assert secret.hex() not in told
        assert repr(secret)[2:-1] not in told


@pytest.mark.parametrize("master", [None, MASTER], ids=["trusting", "demanding"])
def test_an_announcement_too_large_for_a_decision_is_refused_and_the_planner_goes_on(master: Master | None) -> None:
    """The record is readable, but the decision that would record it would be too large; it must not end the planner."""
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
            return story, [letter.cause for letter in await read_dead_letters(place.bus)]

    story, causes = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert causes == ["oversized"]
