"""Planted faults: the checks that the other tests rely on must catch each of these likely bugs.

The same run without the fault is clean, so the checks catch the fault and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from bus.decisions import DecisionLog, Dropped
from bus.errors import InvariantError
from bus.messages import Decision, EpochOpened
from planner.core.core import CoreComponents, PlannerCore
from planner.core.region.records import Task
from planner.core.settling import SettlingRules
from planner.search import algorithm1, ledger
from tests.unit.planner.scenes import World

Plant = Callable[[pytest.MonkeyPatch], CoreComponents | None]


def run(components: CoreComponents | None = None) -> None:
    """Two busy regions; the whole state is validated after each event."""
    World(PlannerCore(0, components=components), seed=11, tasks=80, rate=4.0).run()
    World(PlannerCore(0, components=components), seed=3, tasks=80, rate=10.0, edges=2, devices=30).run()


def _timeline(variant: Callable[[int, int, int], ledger.Timeline]) -> CoreComponents:
    return CoreComponents(ledger=partial(ledger.Ledger, variant))


def one_slot_too_many(monkeypatch: pytest.MonkeyPatch) -> CoreComponents:
    """Off by one: an edge hands out r_e + 1 slots."""
    return _timeline(lambda slots, link1_bps, link2_bps: ledger.Timeline(slots + 1, link1_bps, link2_bps))


def double_release(monkeypatch: pytest.MonkeyPatch) -> CoreComponents:
    """A running task's resources are given back to the timeline twice."""

    class Wrong(ledger.Timeline):
        def give(self, r: ledger.Reservation) -> None:
            super().give(r)
            if r.running:
                super().give(r)

    return _timeline(Wrong)


def release_forgotten(monkeypatch: pytest.MonkeyPatch) -> CoreComponents:
    """A running task keeps its bandwidth for good."""

    class Wrong(ledger.Timeline):
        def give(self, r: ledger.Reservation) -> None:
            if not r.running:
                super().give(r)

    return _timeline(Wrong)


def capacity_checked_at_the_start_only(monkeypatch: pytest.MonkeyPatch) -> CoreComponents:
    """The paper's check: the interval behind the start is not looked at."""

    def wrong(times: list[float], end_s: float, seen: int = 0) -> int:
        return seen

    monkeypatch.setattr(algorithm1, "bisect_left", wrong)
    # the check of the policy's choice would raise first; the ledger's own audit must find the bug, too
    return CoreComponents(check_choice=lambda *_: None)


def device_not_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks compute on one device at once."""
    monkeypatch.setattr(ledger.DeviceAccount, "free", lambda *_: True)


def starts_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> CoreComponents:
    """The reservation of a task that overruns ends at its predicted end."""
    return CoreComponents(settling=SettlingRules(prolonged_end=lambda r, now: None))


def hash_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that the hash does not notice."""
    right = Task.text
    monkeypatch.setattr(Task, "text", lambda self, r: right(self, None))


@pytest.mark.parametrize(
    "plant",
    [
        one_slot_too_many,
        double_release,
        release_forgotten,
        capacity_checked_at_the_start_only,
        device_not_reserved,
        starts_by_the_clock,
    ],
)
def test_a_planted_fault_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    components = plant(monkeypatch)
    with pytest.raises(InvariantError):
        run(components)


def test_the_policys_choice_is_looked_at_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithm1, "bisect_left", lambda times, end_s, seen=0: seen)
    with pytest.raises(InvariantError, match="not free"):
        run()


def test_a_hash_that_misses_reservations_is_caught_by_two_states_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashes() -> set[str]:
        found = set()
        for start in (0.0, 1.0):
            world = World(PlannerCore(0), seed=3, tasks=1, rate=1e9, validate=False)
            while not world.core.ledger.reservations:
                now, _, event = world._heap.pop(0)
                world.step(event, now + start)
            found.add(world.core.tasks["t0"].text(world.core.ledger.reservations["t0"]).split("|", 7)[-1])
        return found

    assert len(hashes()) == 2
    hash_not_kept(monkeypatch)
    assert len(hashes()) == 1


def _stale_log() -> list[Decision | EpochOpened]:
    """A frozen planner of epoch 1 wakes up and writes, after epoch 2 was opened."""
    world = World(PlannerCore(0), seed=11, tasks=30, rate=4.0, validate=False).run()
    first = [d.model_copy(update={"nonce": "one"}) for d in world.log[:30]]
    second = [d.model_copy(update={"epoch": 2, "nonce": "two"}) for d in world.log[30:]]
    stale = world.log[30].model_copy(update={"nonce": "one", "changes": world.log[30].changes[:-1]})
    opened = [
        EpochOpened(region=0, epoch=epoch, nonce=nonce, planner=nonce, lease_s=1.0)
        for epoch, nonce in ((1, "one"), (2, "two"))
    ]
    return [opened[0], *first, opened[1], stale, *second]


def _fold(accept: Callable[[DecisionLog, Decision | EpochOpened], bool]) -> None:
    log, folded = DecisionLog(), PlannerCore(0)
    for message in _stale_log():
        if accept(log, message) and isinstance(message, Decision):
            folded.fold(message)
            if folded.state_hash != message.ledger_hash:
                raise InvariantError("the fold has another hash than the record")


def test_an_ignored_epoch_is_caught() -> None:
    _fold(lambda log, message: not isinstance(log.accept(message), Dropped))
    with pytest.raises(InvariantError):
        _fold(lambda log, message: True)
