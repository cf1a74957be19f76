"""Algorithm 1: the decisions of the literal reference from identical ledgers, and what waiting is worth."""

import random

import pytest

from bus.messages import Placed, Start
from bus.values import Kind, Objective
from planner.core.core import PlannerCore
from planner.search.algorithm1 import Algorithm
from planner.search.placements import Choice
from planner.search.policies import BUILT_IN, Restriction, mixes
from planner.search.waiting import NO_DEVIATIONS, Deviations
from tests.unit.planner import reference
from tests.unit.planner.scenes import MBPS, RandomRegion, Traffic, cloud, device, edge, only, task


class Compared:
    """A policy that asks the reference the same question, from the same ledger, every time."""

    def __init__(self, policy: Restriction, deviations: Deviations = NO_DEVIATIONS) -> None:
        self.policy = policy
        self.name = policy.name
        self.deviations = deviations
        self.core: PlannerCore | None = None
        self.asked = 0
        self.late = 0
        self.differed = 0  # decisions that are others because the predictions are uncertain

    def place(self, algorithm: Algorithm) -> Choice | None:
        if self.deviations:
            certain = self.policy.place(algorithm)
            algorithm.request.deviations = self.deviations
            algorithm = Algorithm(algorithm.request, algorithm.now, algorithm.deadline_s)
            self.differed += self.policy.place(algorithm) != certain
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


@pytest.mark.parametrize(
    "name", [name for name in BUILT_IN if not mixes(BUILT_IN[name])]
)  # those have tests of their own
@pytest.mark.parametrize("own_links", [False, True], ids=["", "own-links"])
@pytest.mark.parametrize("objective", list(Objective))
def test_every_decision_equals_the_references(name: str, objective: Objective, own_links: bool) -> None:
    policy = BUILT_IN[name]
    assert isinstance(policy, Restriction)
    asked = delayed = late = 0
    for seed in range(3):
        compared = Compared(policy)
        core = PlannerCore(0, compared, objective)
        compared.core = core
        rate = (0.2, 1.0, 5.0)[seed % 3]
        world = RandomRegion(
            core, seed, Traffic(rate=rate, devices=4 if own_links else 12, own_links=own_links), validate=own_links
        ).run()
        asked += compared.asked
        late += compared.late
        delayed += world.counts["delayed"]
    assert asked > 150
    assert delayed > 15 or name == "no-delay"
    assert late or name != "cloud-only"


@pytest.mark.parametrize("name", ["deepar", "edge-only", "cloud-only", "device-only"])
@pytest.mark.parametrize("own_links", [False, True], ids=["", "own-links"])
@pytest.mark.parametrize("objective", list(Objective))
def test_every_decision_equals_the_references_with_uncertain_ends(
    name: str, objective: Objective, own_links: bool
) -> None:
    policy = BUILT_IN[name]
    assert isinstance(policy, Restriction)
    differed = late = 0
    for seed in range(2):
        rng = random.Random(seed)
        nodes = [*(f"e{i}" for i in range(3)), *(f"d{i}" for i in range(12))]
        # of some nodes nothing is known; binary fractions, so that equal values are equal in both
        compared = Compared(policy, {node: rng.choice((0.25, 0.5, 1.0, 2.0)) for node in nodes if rng.random() < 0.8})
        core = PlannerCore(0, compared, objective)
        compared.core = core
        RandomRegion(
            core, seed, Traffic(rate=(1.0, 5.0)[seed % 2], devices=4 if own_links else 12, own_links=own_links)
        ).run()
        differed += compared.differed
        late += compared.late
    assert differed > 10 or name == "device-only"
    assert late or name != "cloud-only"


def uncertain(sigma: float, nodes: tuple[str, ...] = ("e1", "d1", "d2")) -> Compared:
    return Compared(BUILT_IN["deepar"], dict.fromkeys(nodes, sigma))  # type: ignore[arg-type]


def second_after(sigma: float, elapsed: float) -> Placed:
    """The placement of a task that arrives when this share of the task on the only slot has passed."""
    policy = uncertain(sigma)
    core = policy.core = PlannerCore(0, policy)
    for node in (edge(slots=1), device("d1"), device("d2")):
        core.handle(node, 0.0)
    first = only(core.handle(task("t1", "d1", samples=10), 0.0), Placed)
    return only(core.handle(task("t2", "d2", samples=10), elapsed * first.delay_s), Placed)  # type: ignore[no-any-return]


def test_a_wait_is_chosen_only_if_it_pays_one_deviation_worse() -> None:
    """The end of a task is uncertain by a share of its whole length, also a moment before its predicted end."""
    assert second_after(0.01, 0.99).placement.edge == "e1"
    core = PlannerCore(0)
    for node in (edge(slots=1), device("d1"), device("d2")):
        core.handle(node, 0.0)
    length = only(core.handle(task("t1", "d1", samples=10), 0.0), Placed).delay_s
    on_device = 10 * 0.06  # all layers on the device
    # the wait pays while 0.01 length + sigma length + length < on_device
    limit = on_device / length - 1.01
    assert limit > 0.5
    assert second_after(limit - 0.01, 0.99).placement.edge == "e1"
    assert second_after(limit + 0.01, 0.99).placement.kind is Kind.DEVICE


def test_a_deadline_is_compared_with_the_predicted_end_itself() -> None:
    policy = uncertain(100.0)
    core = policy.core = PlannerCore(0, policy)
    core.handle(device("d1"), 0.0)
    first = only(core.handle(task("t1", "d1"), 0.0), Placed)
    second = only(core.handle(task("t2", "d1", deadline_s=2.01 * first.delay_s), 0.0), Placed)
    assert second.start_s == first.delay_s


def test_a_wait_for_the_own_device_counts_its_deviation() -> None:
    """The device is faster than the edge, and busy: with exact predictions the task waits for it."""
    placed = {}
    for sigma in (0.0, 2.0):
        policy = uncertain(sigma, ("d1",))
        core = policy.core = PlannerCore(0, policy)
        core.handle(edge(speed=0.9), 0.0)
        core.handle(device("d1"), 0.0)
        first = only(core.handle(task("t1", "d1"), 0.0), Placed)
        assert first.placement.kind is Kind.DEVICE
        placed[sigma] = only(core.handle(task("t2", "d1"), 0.9 * first.delay_s), Placed)
    assert placed[0.0].placement.kind is Kind.DEVICE
    assert placed[0.0].wait_s > 0
    assert placed[2.0].placement.edge == "e1"
    assert placed[2.0].wait_s == 0


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
