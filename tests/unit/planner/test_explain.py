"""Why a task got what it got, from the records alone."""

import re
from typing import Any

import pytest

from bus.errors import UnknownNameError
from bus.messages import Decision, Ended, LinkMeasurement, NodeAnnounced, Placed, Rerouted, TaskState
from bus.text.units import parse_duration
from bus.values import Objective
from planner.core.core import Event, PlannerCore, Tick
from planner.core.options import CoreOptions
from planner.explain import explain
from planner.learning.lessons import name_of
from tests.unit.planner.core.test_learning import Region, Truth
from tests.unit.planner.scenes import RandomRegion, Traffic, cloud, completed, device, edge, task


def records(*events: Event, policy: str = "deepar", objective: Objective = Objective.SEQUENTIAL) -> list[Decision]:
    core = PlannerCore(0, policy, objective)
    found: list[Decision] = []
    for number, event in enumerate(events):
        now = max(0.0, number * 0.01)
        changes = core.handle(event, now)
        if changes:
            found.append(
                Decision(
                    region=0,
                    epoch=1,
                    nonce="n",
                    seq=len(found) + 1,
                    now_s=now,
                    inputs={},
                    changes=tuple(changes),
                    ledger_hash=core.state_hash,
                )
            )
    return found


def test_the_one_that_was_chosen_comes_first_and_is_the_recorded_one() -> None:
    for seed in range(3):
        world = RandomRegion(PlannerCore(0), seed, Traffic(rate=3.0), validate=False).run()
        for task_id, placed in list(world.placed.items())[::5]:
            found = explain(world.log, task_id)
            assert found.decided == placed
            assert found.state == world.ended[task_id].state
            assert [c.chosen for c in found.candidates].count(True) == 1
            best = found.candidates[0]
            assert best.placement == placed.placement
            assert best.start_in_s == pytest.approx(placed.wait_s)
            assert best.delay_s == pytest.approx(placed.delay_s)
            ends = [
                c.start_in_s + c.delay_s
                for c in found.candidates
                if c.start_in_s is not None and c.delay_s is not None and "failed" not in c.lacked
            ]
            assert ends == sorted(ends)
            assert bool(found.waited_for) == (placed.wait_s > 0)


def test_a_rerouted_task_is_explained_by_its_first_placement_and_measured_against_its_last() -> None:
    log = records(
        edge(), device("d1"), device("d2"), task("t1", "d1", samples=100), task("t2", "d2", samples=100),
        completed("t1"), policy="elastic", objective=Objective.PIPELINED,
    )  # fmt: skip
    first = next(c for decision in log for c in decision.changes if isinstance(c, Placed) and c.task_id == "t2")
    last = log[-1].changes[-1]
    assert isinstance(last, Rerouted)
    found = explain(log, "t2")
    assert found.decided is not None
    assert found.decided.placement == last.placement
    assert found.decided.delay_s == pytest.approx(last.from_s - first.start_s + last.delay_s)
    assert [c.placement for c in found.candidates if c.chosen] == [first.placement]
    assert "rerouted to" in found.story[-1]
    assert f"through {last.placement.edge}" in found.story[-1]


def test_tasks_that_start_at_once_on_less_are_explained_as_they_were_placed() -> None:
    world = RandomRegion(PlannerCore(0, "elastic", Objective.PIPELINED), 0, Traffic(rate=8.0, devices=60)).run()
    for task_id, placed in list(world.placed.items())[::3]:
        found = explain(world.log, task_id)
        (chosen,) = [c for c in found.candidates if c.chosen]
        assert chosen.placement == placed.placement
        assert chosen.start_in_s == pytest.approx(placed.wait_s)


def test_what_was_lacked_and_waited_for_is_said() -> None:
    log = records(edge(slots=1), device("d1"), device("d2"), task("t1", "d1"), task("t2", "d2"))
    found = explain(log, "t2")
    chosen = found.candidates[0]
    assert chosen.chosen
    assert "slot" in chosen.lacked
    assert found.waited_for == ("t1 to end on e1",)
    assert any("admitted" in line for line in found.story)
    cloudless = [c for c in found.candidates if c.family == "device+cloud"]
    assert cloudless[0].placement is None
    assert "cloud" in cloudless[0].lacked


def test_a_policy_that_does_not_use_a_candidate_is_named() -> None:
    log = records(edge(), device(), task(), completed(), policy="edge-only")
    found = explain(log, "t1")
    alone = next(c for c in found.candidates if c.family == "device")
    assert "edge-only" in alone.lacked
    assert not alone.chosen
    assert found.state == TaskState.COMPLETED


def test_a_task_that_was_never_placed_has_only_a_story() -> None:
    log = records(edge(), device(models=()), task())
    found = explain(log, "t1")
    assert (found.decided, found.candidates, found.state) == (None, (), TaskState.REJECTED)
    assert "unknown_model" in found.story[-1]
    assert [c for d in log for c in d.changes if isinstance(c, Ended)]
    assert not [c for d in log for c in d.changes if isinstance(c, Placed)]


def test_the_story_tells_durations_to_three_digits_with_a_unit() -> None:
    log = records(edge(slots=1), device("d1"), device("d2"), task("t1", "d1"), task("t2", "d2"), completed("t1"))
    story = [line for task_id in ("t1", "t2") for line in explain(log, task_id).story]
    durations = [found for line in story for found in re.findall(r"([0-9.]+ \w+) (?:predicted|later|earlier)", line)]
    durations += [found for line in story for found in re.findall(r"(?:start|COMPLETED) in ([0-9.]+ \w+)", line)]
    assert len(durations) >= 3
    for text in durations:
        assert parse_duration(text) > 0, story
        assert len(text.split()[0].replace(".", "").lstrip("0")) <= 3, story


def test_an_unknown_task() -> None:
    with pytest.raises(UnknownNameError, match="t9"):
        explain(records(edge(), device(), task()), "t9")


def test_what_ends_after_the_deadline_is_said_of_each_candidate() -> None:
    submitted = task("t1", "d1", samples=100, deadline_s=4.0)
    found = explain(records(edge("e1"), edge("e2", speed=1.5), device("d1"), submitted), "t1")
    assert found.candidates[0].edge == "e1"
    assert "deadline" not in found.candidates[0].lacked
    (slow,) = [c for c in found.candidates if c.edge == "e2" and c.family == "device+edge"]
    assert slow.delay_s is not None
    assert "after the deadline" in slow.lacked


def test_the_devices_own_link_is_said_to_be_lacked_and_waited_for() -> None:
    own = device("d1", link1_capacity_bps=20_000_000)
    log = records(edge(slots=4), own, task("t1", "d1"), task("t2", "d1"), policy="edge-only")
    found = explain(log, "t2")
    assert "the device's own link (none free of 20 Mbps wanted)" in found.candidates[0].lacked
    assert found.waited_for == ("t1 to end on e1",)


@pytest.mark.parametrize(
    ("policy", "nodes", "waits_for"),
    [
        ("cloud-only", [edge(), device("d1")], ("a cloud to join",)),
        ("cloud-only", [edge(), cloud(draining=True), device("d1")], ("a cloud to join",)),
        ("cloud-only", [edge(), cloud(models=()), device("d1")], ("a cloud that runs m (c1 does not)",)),
        ("edge-only", [cloud(), device("d1")], ("an edge to join",)),
        ("edge-only", [cloud(), device("d1", reachable_edges=("e7", "e8"))], ("one of the edges e7, e8 to join",)),
        ("deepar", [edge()], ("device d1 to join",)),
        ("deepar", [edge(), device("d1", draining=True)], ("device d1, which drains, to join again",)),
    ],
)
def test_a_task_that_waits_says_for_what_and_since_when(
    policy: str, nodes: list[NodeAnnounced], waits_for: tuple[str, ...]
) -> None:
    events: list[Event] = [*nodes, task("t1", "d1"), edge("e9", models=(), incarnation="late")]
    found = explain(records(*events, policy=policy), "t1")
    assert found.state == TaskState.WAITING
    assert found.waiting_since_s == pytest.approx(0.01 * len(nodes))
    if policy != "edge-only" or "d1 to" in waits_for[0] or "e7" in waits_for[0]:
        assert found.waits_for == waits_for
    else:  # the last edge that joined does not run it
        assert found.waits_for == ("an edge that runs m (e9 does not)",)
    assert found.waiting_s == pytest.approx(0.01)
    assert found.decided is None


def test_a_task_that_found_nothing_fails_with_what_it_waited_for() -> None:
    core = PlannerCore(0, "cloud-only", options=CoreOptions(patience_s=60.0))
    for event in (edge(lease_s=1e6), device("d1", lease_s=1e6), task("t1", "d1")):
        core.handle(event, 0.0)
    (ended,) = core.handle(Tick(), 61.0)
    assert isinstance(ended, Ended)
    assert (ended.cause, ended.detail) == ("no_node", "waited for a cloud to join")


def taught_region(**options: Any) -> Region:
    """Two edges, one of them far away, and a task overhead that no profile knows."""
    truth = Truth(latency_s={(1, "e1"): 0.02}, task_s=0.05)
    region = Region(truth, edge("e1"), edge("e2"), cloud(), device(), **options)
    region.heartbeat(LinkMeasurement(link=1, edge="e1", latency_s=0.02))
    region.run(4)
    return region


@pytest.mark.parametrize("objective", list(Objective))
def test_latency_and_overheads_of_each_candidate_are_shares_of_its_delay(objective: Objective) -> None:
    region = taught_region(objective=objective)
    found = explain(region.records, "t4")
    chosen = found.candidates[0]
    assert found.decided is not None
    assert found.decided.overhead is not None
    assert chosen.placement == found.decided.placement
    assert chosen.delay_s == pytest.approx(found.decided.delay_s)
    assert chosen.latency_s == pytest.approx(found.decided.overhead.latency_s)
    assert chosen.overhead_s == pytest.approx(found.decided.overhead.task_s) != 0.0
    crossings = 10 if objective is Objective.SEQUENTIAL else 1
    for candidate in found.candidates:
        expected = crossings * 2 * 0.02 if candidate.edge == "e1" else 0.0
        assert candidate.latency_s == pytest.approx(expected), candidate.edge


def test_what_was_learned_before_the_placement_names_its_tasks_and_nothing_later() -> None:
    region = taught_region(policy="edge-only")
    found = explain(region.records, "t3")
    named = {name_of(lesson.value): lesson.tasks for lesson in found.lessons}
    assert named["d1 - e1"] == (), "a probe"
    assert named["m on e2"] == named["d1 - e2"] == ("t1", "t2")
    assert [name_of(lesson.value) for lesson in explain(region.records, "t1").lessons] == ["d1 - e1"]
    assert not any("t3" in lesson.tasks for lesson in found.lessons)
    assert sum("learned: took" in line for line in found.story) == 1, "what it taught itself"


def test_predicted_and_measured_stand_side_by_side() -> None:
    region = taught_region()
    first, last = (explain(region.records, name) for name in ("t1", "t4"))
    assert first.ended is not None
    assert (first.ended.delay_s, first.decided) == (region.delays[0], region.placed[0])
    assert first.error == pytest.approx(region.delays[0] / region.placed[0].delay_s - 1.0)
    assert last.error is not None
    assert first.error is not None
    assert abs(last.error) < first.error, "it has learned"


def test_candidates_are_ordered_by_what_their_wait_counts() -> None:
    """A wait counts one deviation longer, so a candidate that ends earlier may stand lower."""
    region = Region(Truth(noise=1.0), edge("e1", slots=1), device("d1"), device("d2"))
    region.run(6)
    region.step(task("long", "d1", samples=40))
    region.step(task("later", "d2", samples=40))
    found = explain(region.records, "later")
    counted = [c for c in found.candidates if c.start_in_s is not None and c.delay_s is not None]
    assert any(c.margin_s > 0 for c in counted)
    assert all((c.margin_s > 0) <= ((c.start_in_s or 0) > 0) for c in counted)
    ends = [(c.start_in_s or 0) + c.margin_s + (c.delay_s or 0) for c in counted]
    assert ends == sorted(ends)


def test_a_choice_of_several_routes_is_among_the_candidates_with_its_shares() -> None:
    mixed = 0
    for seed in range(3):
        core = PlannerCore(0, "routes", Objective.PIPELINED)
        world = RandomRegion(core, seed, Traffic(rate=3.0, devices=5), validate=False).run()
        for task_id, placed in list(world.placed.items())[::4]:
            found = explain(world.log, task_id)
            assert [c.chosen for c in found.candidates].count(True) == 1
            assert found.candidates[0].placement == placed.placement
            assert found.candidates[0].delay_s == pytest.approx(placed.delay_s)
            mixed += placed.placement.routes is not None
    assert mixed > 15


def test_what_a_device_with_other_tasks_could_have_gained_is_explained() -> None:
    links: dict[str, Any] = {"max_link1_bps": 300_000_000, "max_link2_bps": 10_000_000}
    other = task("other", tiers=("edge", "cloud"), samples=5000, max_link1_bps=1_000_000)
    nodes = edge(slots=8, speed=20.0), cloud(), device()
    told = {
        count: explain(
            records(
                *nodes, *[other][:count], task(samples=500, input_bytes=1_000, **links),
                policy="routes", objective=Objective.PIPELINED,
            ),
            "t1",
        )
        for count in (0, 1)
    }  # fmt: skip
    first, second = told[0].candidates[0], told[1].candidates[0]
    assert first.placement is not None
    assert second.placement is not None
    assert (first.placement.uses_device, second.placement.uses_device) == (True, False)
    assert "a gain of 15 % on the device, which has other tasks" in second.lacked
    assert "a gain" not in first.lacked
