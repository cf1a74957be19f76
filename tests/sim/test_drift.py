"""Changes of speed in virtual time: the planner that learns follows them, loses nothing and does not alternate.

Regret is the mean delay of `deepar` over that of the best fixed policy on the same tasks. The fixed policies do not learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import fmean

import pytest

from bus.messages import NodeAnnounced, NodeHeartbeat, SpeedMeasurement, TaskState
from bus.values import Role
from loadgen.replay.outcome import Outcome
from loadgen.sim.core_driver import Drive, core_for
from loadgen.sim.environment import Environment, Speed, link1, link2
from loadgen.sim.platforms import platforms
from loadgen.sim.scenario import Scenario
from tests.known import known

FIXED = ("device-only", "edge-only", "cloud-only", "neurosurgeon")
SLOW_S, AGAIN_S = 200.0, 400.0  # the change, and the recovery
TASKS = Scenario(
    devices=2,
    edges=1,
    reachable=None,
    arrivals="constant",
    tasks=150,
    within_s=600,
    models={"alexnet": 1.0},
    samples=(10, 10),
    input_bytes=(500_000, 500_000),
    max_link1_bps=(200e6, 200e6),
    max_link2_bps=(20e6, 20e6),
    slots=(4, 4),
)
NO_CLOUD = {"max_link2_bps": (1e6, 1e6)}  # link 2 is too slow to be used
BIG = {"models": {"vgg16": 1.0}, "input_bytes": (50_000, 50_000)}  # much work, little input: the cloud is best


def third(*names: str) -> Speed:
    """These nodes or links have a third of their speed between the change and the recovery."""
    return lambda name, at_s: 1 / 3 if name in names and SLOW_S <= at_s < AGAIN_S else 1.0


def played(scenario: Scenario, speed: Speed) -> list[Outcome]:
    machines, ended = platforms(scenario.profile), []  # type: ignore[var-annotated]
    run = Drive(core_for(scenario), ended.append, Environment(machines, speed=speed))
    nodes = scenario.nodes(1, machines.profiles)
    run.announce(nodes)
    if scenario.learn:
        run.measure_speeds(own_speeds(run, nodes, speed))
        run.measure_links(nodes)
    run.run(scenario.schedule(1).entries)
    assert [outcome.state for outcome in ended] == [TaskState.COMPLETED] * scenario.task_count
    return sorted(ended, key=lambda outcome: outcome.scheduled_s)


def own_speeds(run: Drive, nodes: Sequence[NodeAnnounced], speed: Speed) -> Callable[[float], list[NodeHeartbeat]]:
    """What devices and edges without work measure of their own speed; told when it has changed, as by live nodes."""
    told: dict[str, float] = {}

    def reports(now_s: float) -> list[NodeHeartbeat]:
        running = [task.placed for task in run.core.tasks.values() if task.placed is not None]
        busy = {name for placed in running for name in (placed.device, placed.placement.edge)}
        found = []
        for node in nodes:
            factor = 1.0 / speed(node.node, now_s)
            if node.role is Role.CLOUD or node.node in busy or told.get(node.node, 1.0) == factor:
                continue
            told[node.node] = factor
            speeds = tuple(SpeedMeasurement(model=model.model, factor=factor) for model in node.models)
            found.append(NodeHeartbeat(node=node.node, incarnation=node.incarnation, speeds=speeds))
        return found

    return reports


def regret(
    learning: list[Outcome], fixed: list[list[Outcome]], since_s: float, until_s: float, completed: int = 5
) -> float:
    """Mean delay of `learning` over that of the best of `fixed`, for tasks of a period after its first `completed` ends."""
    inside = [i for i, one in enumerate(learning) if since_s <= one.scheduled_s < until_s]

    def before(i: int) -> int:
        return sum(known(learning[k].ended_s) <= learning[i].scheduled_s for k in inside)

    judged = [i for i in inside if before(i) >= completed]
    assert len(judged) > 20

    def mean(outcomes: list[Outcome]) -> float:
        return fmean(known(outcomes[i].delay_s) for i in judged)

    return mean(learning) / min(mean(one) for one in fixed)


def alternations(outcomes: list[Outcome]) -> int:
    """How often the place changes, without single tasks that try a place again."""
    places = [(one.kind, known(one.placement).edge) for one in outcomes]
    lasting = [place for place, tasks in groupby(places) if len(list(tasks)) > 1]
    return len(list(groupby(lasting))) - 1


ONE_LINK1 = (link1("device-00000", "edge-0000"), link1("device-00001", "edge-0000"))
CASES: dict[str, tuple[Scenario, Speed]] = {
    "the edge of two": (TASKS.varied(edges=2), third("edge-0000")),
    "the edge of two, no cloud": (TASKS.varied(edges=2, **NO_CLOUD), third("edge-0000")),
    "the only edge": (TASKS, third("edge-0000")),
    "link 1": (TASKS, third(*ONE_LINK1)),
    "link 1, no cloud": (TASKS.varied(**NO_CLOUD), third(*ONE_LINK1)),
    "link 1 to one of two edges": (TASKS.varied(edges=2), third(*ONE_LINK1)),
    "link 2": (TASKS.varied(**BIG), third(link2("edge-0000"))),
    "link 2 of one of two edges": (TASKS.varied(edges=2, **BIG), third(link2("edge-0000"))),
}


def compared(scenario: Scenario, speed: Speed) -> tuple[list[Outcome], list[list[Outcome]]]:
    """The outcomes of `deepar` with learning, and of the fixed policies without."""
    fixed = [played(scenario.varied(policy=policy), speed) for policy in FIXED]
    return played(scenario.varied(learn=True), speed), fixed


@pytest.mark.parametrize("case", CASES)
def test_regret_is_small_again_five_tasks_after_a_change_and_after_the_recovery(case: str) -> None:
    learning, fixed = compared(*CASES[case])
    assert regret(learning, fixed, SLOW_S, AGAIN_S) < 1.1
    assert regret(learning, fixed, AGAIN_S, 600.0) < 1.1
    assert alternations(learning) <= 2


def test_the_recovery_of_an_edge_without_an_equal_is_found_within_five_tasks() -> None:
    """All tasks run on their devices meanwhile, so no task shows anything of the edge: it measures itself."""
    learning, fixed = compared(TASKS.varied(**NO_CLOUD), third("edge-0000"))
    assert regret(learning, fixed, SLOW_S, AGAIN_S) < 1.1
    back = [one.scheduled_s for one in learning if one.scheduled_s >= AGAIN_S and known(one.placement).edge is not None]
    tasks_until_back = sum(AGAIN_S <= one.scheduled_s < back[0] for one in learning)
    assert tasks_until_back <= 4
    assert regret(learning, fixed, AGAIN_S, 600.0) < 1.1
    assert alternations(learning) <= 2


def test_without_learning_the_change_is_not_noticed() -> None:
    scenario, speed = CASES["the edge of two, no cloud"]
    fixed = [played(scenario.varied(policy=policy), speed) for policy in FIXED]
    assert regret(played(scenario, speed), fixed, SLOW_S, AGAIN_S) > 1.3
