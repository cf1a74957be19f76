"""Planted faults: the checks that the other tests rely on must catch each of these likely bugs.

The same run without the fault is clean, so the checks catch the fault and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from bus.decisions import DecisionLog, Dropped
from bus.errors import InvariantError
from bus.messages import Decision, EpochOpened
from planner.core.core import CoreComponents, PlannerCore
from planner.core.region.records import Task
from planner.core.settling import SettlingRules
from planner.search.algorithm1 import Algorithm
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE
from planner.search.ledger.accounts import DeviceAccount, EdgeAccount
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import Reservation
from planner.search.ledger.timeline import Timeline
from planner.search.placements import Choice
from planner.search.policies import BUILT_IN, Policy, Restriction
from tests.unit.planner.scenes import RandomRegion, Traffic, task


def run(components: CoreComponents | None = None, policy: Policy = BUILT_IN["deepar"]) -> None:
    """Two busy regions; the whole state is validated after each event."""

    def core() -> PlannerCore:
        return PlannerCore(0, policy, components=components)

    RandomRegion(core(), 11, Traffic(tasks=80, rate=4.0)).run()
    RandomRegion(core(), 3, Traffic(tasks=80, rate=10.0, edges=2, devices=30)).run()


# --- faults of the ledger --------------------------------------------------------------------------------------------


def one_slot_too_many(slots: int, link1_bps: int, link2_bps: int) -> Timeline:
    """Off by one: an edge hands out r_e + 1 slots."""
    return Timeline(slots + 1, link1_bps, link2_bps)


class ReleasedTwice(Timeline):
    """A running task's resources are given back to the timeline twice."""

    def give(self, r: Reservation) -> None:
        super().give(r)
        if r.running:
            super().give(r)


class NeverReleased(Timeline):
    """A running task keeps its bandwidth for good."""

    def give(self, r: Reservation) -> None:
        if not r.running:
            super().give(r)


class AlwaysFree(DeviceAccount):
    """Two tasks compute on one device at once."""

    def free(self, start_s: float, end_s: float) -> bool:
        return True


# --- a fault of the search -------------------------------------------------------------------------------------------


class StartOnly(Restriction):
    """The paper's check: a placement must fit at its start; the interval after the start is not checked."""

    def place(self, algorithm: Algorithm) -> Choice | None:
        choices = list(self._choices(algorithm))
        return min(choices, key=lambda one: one.start_s + one.delay_s) if choices else algorithm.best({DEVICE})

    def _choices(self, algorithm: Algorithm) -> Iterator[Choice]:
        now = algorithm.now
        for option in algorithm.request.edges:
            timeline = option.account.timeline
            for start_s in (now, *(at_s for at_s in timeline.times if at_s > now)):
                # An edge that is at all times as free as it is at the start.
                always = EdgeAccount(option.account.name, *timeline.at(start_s))
                for family in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE):
                    choice = algorithm.at(option._replace(account=always), family, start_s)
                    if choice is not None:
                        yield choice


START_ONLY = StartOnly("start-only")


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "components",
    [
        CoreComponents(ledger=partial(Ledger, one_slot_too_many)),
        CoreComponents(ledger=partial(Ledger, ReleasedTwice)),
        CoreComponents(ledger=partial(Ledger, NeverReleased)),
        CoreComponents(ledger=partial(Ledger, make_device=AlwaysFree)),
        # the reservation of a task that overruns ends at its predicted end
        CoreComponents(settling=SettlingRules(prolonged_end=lambda r, now: None)),
    ],
    ids=["one slot too many", "released twice", "never released", "device not reserved", "overrun not booked"],
)
def test_a_planted_fault_is_caught(components: CoreComponents) -> None:
    run()
    with pytest.raises(InvariantError):
        run(components)


def test_the_policys_choice_is_checked_against_the_ledger() -> None:
    with pytest.raises(InvariantError, match="not free"):
        run(policy=START_ONLY)


def test_the_audit_of_the_ledger_finds_a_choice_that_was_not_checked() -> None:
    with pytest.raises(InvariantError, match="violated on edge"):
        run(CoreComponents(check_choice=lambda *_: None), START_ONLY)


class WithoutReservation(Task):
    """A planted fault: the text that enters the state hash leaves out the reservation."""

    def text(self, r: Reservation | None) -> str:
        return super().text(None)


@pytest.mark.parametrize(("kind", "distinct"), [(Task, 2), (WithoutReservation, 1)])
def test_two_states_that_differ_in_a_reservation_have_different_texts(kind: type[Task], distinct: int) -> None:
    reserved = (Reservation("t1", 1, "e1", "d1", start_s, 1.0, 1, 1, 1) for start_s in (0.0, 1.0))
    assert len({kind(task("t1"), 1, 0.0).text(r) for r in reserved}) == distinct


def _stale_log() -> list[Decision | EpochOpened]:
    """A frozen planner of epoch 1 wakes up and writes, after epoch 2 was opened."""
    world = RandomRegion(PlannerCore(0), 11, Traffic(tasks=30, rate=4.0), validate=False).run()
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
