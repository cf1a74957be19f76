"""A restart folds what was decided and arrives at the same state, from the start or from a snapshot."""

import json

import pytest

from bus.errors import ConfigError, InvariantError
from bus.messages import Decision
from bus.values import Objective
from planner.core.core import PlannerCore
from planner.core.options import CoreOptions
from tests.unit.planner.scenes import RandomRegion, Traffic

CASES = [
    ("deepar", Objective.SEQUENTIAL, Traffic(rate=2.0)),
    ("deepar", Objective.PIPELINED, Traffic(rate=2.0)),
    ("elastic", Objective.PIPELINED, Traffic(rate=8.0, devices=60)),  # running tasks are rerouted
    ("deepar", Objective.PIPELINED, Traffic(rate=6.0, batches=True)),  # predictions depend on the tasks under way
    ("elastic", Objective.PIPELINED, Traffic(rate=8.0, devices=60, batches=True)),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("policy", "objective", "traffic"), CASES)
def test_folding_the_records_rebuilds_every_hash(
    seed: int, policy: str, objective: Objective, traffic: Traffic
) -> None:
    world = RandomRegion(PlannerCore(0, policy, objective), seed, traffic, validate=False).run()
    assert (world.counts["rerouted"] > 0) == (policy == "elastic")
    assert len(world.log) > 100
    folded = PlannerCore(0, objective=objective)
    for decision in world.log:
        folded.fold(Decision.model_validate_json(decision.model_dump_json()))
        assert folded.state_hash == decision.ledger_hash
    folded.validate()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("policy", "objective", "traffic"), CASES)
def test_from_any_snapshot_on_the_same_decisions_follow(
    seed: int, policy: str, objective: Objective, traffic: Traffic
) -> None:
    """Not only the same state: a core restored from JSON decides the rest as the one that went on."""

    class Restarting(RandomRegion):
        def step(self, event, now):  # type: ignore[no-untyped-def]
            if len(self.log) % 7 == 6:
                state = json.loads(json.dumps(self.core.to_state()))
                restored = PlannerCore.from_state(state, policy, objective)
                restored.restart_leases(now)
                assert restored.state_hash == self.core.state_hash
                self.core = restored
            return super().step(event, now)

    plain = RandomRegion(PlannerCore(0, policy, objective), seed, traffic).run()
    restarting = Restarting(PlannerCore(0, policy, objective), seed, traffic).run()
    assert [d.changes for d in plain.log] == [d.changes for d in restarting.log]
    assert plain.log[-1].ledger_hash == restarting.log[-1].ledger_hash


def test_the_same_events_make_the_same_records() -> None:
    one = RandomRegion(PlannerCore(0), 5, validate=False).run()
    two = RandomRegion(PlannerCore(0), 5, validate=False).run()
    assert one.log == two.log


def test_a_stale_planners_record_is_noticed() -> None:
    """An epoch that is ignored lets a record in that was decided on another state: the fold does not go unnoticed."""
    world = RandomRegion(PlannerCore(0), 1, Traffic(rate=3.0), validate=False).run()
    for at in range(20, len(world.log) - 1, 9):
        folded = PlannerCore(0)
        for decision in world.log[:at]:
            folded.fold(decision)
        try:
            folded.fold(world.log[at - 1])  # what a thawed planner might still write
        except InvariantError:
            continue
        assert folded.state_hash != world.log[at - 1].ledger_hash


def test_a_state_of_another_version_or_region_is_refused() -> None:
    state = PlannerCore(0).to_state()
    with pytest.raises(ConfigError, match="version"):
        PlannerCore(0).restore({**state, "version": 99})
    with pytest.raises(ConfigError, match="region"):
        PlannerCore(1).restore(state)


@pytest.mark.parametrize("now_s", [float("inf"), float("nan"), "soon", [1.0]])
def test_a_state_with_a_time_that_is_none_is_refused(now_s: object) -> None:
    state = PlannerCore(0).to_state()
    with pytest.raises(ValueError, match="not a time"):
        PlannerCore(0).restore({**state, "now_s": now_s})


def test_memory_is_bounded_by_what_lives_and_what_is_remembered() -> None:
    core = PlannerCore(0, options=CoreOptions(remember_ended=20))
    RandomRegion(core, 2, Traffic(tasks=300, rate=5.0, orderly=True), validate=False).run()
    assert (len(core.tasks), len(core.ended)) == (0, 20)
    assert all(len(account.timeline.times) <= 3 for account in core.ledger.edges.values())
    assert not core.ledger.devices
    assert core.timer_entries < 300
