"""Algorithm 1: the decisions of the literal reference from identical ledgers, and what waiting is worth."""

import pytest

from bus.messages import Placed, Start
from bus.values import Kind, Objective
from planner.core.core import PlannerCore
from planner.search.algorithm1 import Algorithm, Choice
from planner.search.policies import BUILT_IN, Restriction
from tests.unit.planner import reference
from tests.unit.planner.scenes import MBPS, World, cloud, device, edge, only, task


class Compared:
    """A policy that asks the reference the same question, from the same ledger, every time."""

    def __init__(self, policy: Restriction) -> None:
        self.policy = policy
        self.name = policy.name
        self.core: PlannerCore | None = None
        self.asked = 0
        self.late = 0

    def place(self, algorithm: Algorithm) -> Choice | None:
        choice = self.policy.place(algorithm)
        assert self.core is not None
        wanted = reference.place(
            algorithm.request,
            self.core.ledger,
            algorithm.now,
            device=self.core.tasks[algorithm.request.task_id].submitted.device,
            families=self.policy.families,
            device_computes=self.policy.device_computes,
            delayed=self.policy.delayed,
            deadline_s=algorithm.deadline_s,
        )
        assert choice == wanted
        self.asked += 1
        self.late += wanted is None and algorithm.deadline_s < float("inf")
        return choice


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("own_links", [False, True], ids=["", "own-links"])
@pytest.mark.parametrize("objective", list(Objective))
def test_every_decision_equals_the_references(name: str, objective: Objective, own_links: bool) -> None:
    policy = BUILT_IN[name]
    assert isinstance(policy, Restriction)
    asked = delayed = late = 0
    for seed in range(6):
        compared = Compared(policy)
        core = PlannerCore(0, compared, objective)
        compared.core = core
        rate = (0.2, 1.0, 5.0)[seed % 3]
        world = World(
            core, seed, rate=rate, validate=own_links, devices=4 if own_links else 12, own_links=own_links
        ).run()
        asked += compared.asked
        late += compared.late
        delayed += world.counts["delayed"]
    assert asked > 300
    assert delayed > 30 or name == "no-delay"
    assert late or name != "cloud-only"


def test_delayed_start_takes_the_slot_that_is_about_to_be_freed() -> None:
    core = PlannerCore(0)
    for node in (edge(slots=1), device("d1"), device("d2")):
        core.handle(node, 0.0)
    first = only(core.handle(task("t1", "d1", samples=10), 0.0), Placed)
    assert first.placement.kind is Kind.EDGE
    end_s = first.start_s + first.delay_s
    changes = core.handle(task("t2", "d2", samples=10), end_s - 0.01)
    second = only(changes, Placed)
    assert second.placement.edge == "e1"
    assert second.start_s == end_s
    assert second.wait_s == pytest.approx(0.01)
    assert not [change for change in changes if isinstance(change, Start)]


def test_no_delay_runs_on_the_device_where_deepar_would_wait() -> None:
    core = PlannerCore(0, "no-delay")
    for node in (edge(slots=1), device("d1"), device("d2")):
        core.handle(node, 0.0)
    first = only(core.handle(task("t1", "d1", samples=10), 0.0), Placed)
    second = only(core.handle(task("t2", "d2", samples=10), first.delay_s - 0.01), Placed)
    assert second.placement.kind is Kind.DEVICE
    assert second.wait_s == 0.0


def test_a_grant_is_what_is_free_during_the_whole_interval_not_at_its_start() -> None:
    """10 Mbit/s are free now, none from the start of a scheduled task on: a task that needs longer cannot have them."""
    core = PlannerCore(0, "edge-only")
    for node in (edge(slots=9, link1_capacity_bps=100 * MBPS), *(device(f"d{i}") for i in range(1, 6))):
        core.handle(node, 0.0)

    def placed(name: str, samples: int, mbps: int) -> Placed:
        found = only(core.handle(task(f"t{name}", f"d{name}", samples=samples, max_link1_bps=mbps * MBPS), 0.0), Placed)
        core.validate()
        assert isinstance(found, Placed)
        return found

    first = placed("1", 100, 50)
    placed("2", 2000, 40)
    third = placed("3", 1000, 60)
    assert third.start_s == first.delay_s
    assert third.placement.link1_bps == 60 * MBPS
    long = placed("4", 100, 60)
    assert long.start_s >= third.start_s + third.delay_s
    short = placed("5", 10, 60)  # over before the third begins
    assert (short.start_s, short.placement.link1_bps) == (0.0, 10 * MBPS)
    assert short.delay_s <= third.start_s


def test_a_device_computes_one_task_at_a_time_and_sends_another_beside_it() -> None:
    core = PlannerCore(0, "device-only")
    core.handle(device(), 0.0)
    first = only(core.handle(task("t1"), 0.0), Placed)
    second = only(core.handle(task("t2"), 0.0), Placed)
    assert second.start_s == first.delay_s
    core = PlannerCore(0)
    core.handle(device(), 0.0)
    core.handle(task("t1", samples=1000), 0.0)  # no edge is there, so the device is taken
    core.handle(edge(slots=5), 1.0)
    core.handle(cloud(), 1.0)
    other = only(core.handle(task("t2"), 1.0), Placed)
    assert (other.placement.cut1, other.wait_s) == (0, 0.0)


def test_ties_go_to_the_edge_that_is_first_by_name() -> None:
    core = PlannerCore(0)
    for node in (edge("e2"), edge("e1"), edge("e10"), device()):
        core.handle(node, 0.0)
    assert only(core.handle(task(), 0.0), Placed).placement.edge == "e1"
