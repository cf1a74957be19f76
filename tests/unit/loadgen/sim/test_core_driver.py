"""The core-only driver: exact delays, the core's queueing, determinism, noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bus.errors import PolicyError
from bus.messages import Change, Ended, Placed, Rerouted, SeedInput, Start, TaskState, TaskSubmitted
from bus.values import Objective, Placement, Role
from loadgen.replay.outcome import Outcome
from loadgen.replay.schedule import Entry
from loadgen.sim.core_driver import Drive, core_for, drive
from loadgen.sim.platforms import platforms
from loadgen.sim.scenario import Scenario
from planner.core.core import Event
from planner.search.cost import Costs, PlatformRow
from tests.known import known
from tests.unit.loadgen.machines import machines

POLICIES = ("device-only", "edge-only", "cloud-only", "neurosurgeon", "no-delay", "deepar")
BUSY = Scenario(devices=60, edges=3, within_s=30)


def delays_s(outcomes: Sequence[Outcome]) -> list[float]:
    return [known(outcome.delay_s) for outcome in outcomes]


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("policy", POLICIES)
def test_every_task_completes_after_what_the_cost_model_says(policy: str, objective: Objective) -> None:
    scenario = BUSY.varied(policy=policy, objective=objective)
    platform = machines()
    outcomes = drive(scenario, 3, platform)
    assert [o.task_id for o in outcomes] == [e.task.task_id for e in scenario.schedule(3).entries]
    tasks = {entry.task.task_id: entry.task for entry in scenario.schedule(3).entries}
    for outcome in outcomes:
        assert outcome.state is TaskState.COMPLETED
        place, task = known(outcome.placement), tasks[outcome.task_id]
        rows = (PlatformRow(platform.model(role, task.model)) for role in (Role.DEVICE, Role.EDGE, Role.CLOUD))
        expected = Costs(*rows).delay_s(
            place.cut1, place.cut2, place.link1_bps, place.link2_bps, task.samples, objective, task.input_bytes
        )
        assert known(outcome.ended_s) - known(outcome.started_s) == pytest.approx(expected, rel=1e-9)
        assert outcome.delay_s == pytest.approx(known(outcome.wait_s) + expected, rel=1e-9)


def test_nothing_is_over_booked_at_any_instant() -> None:
    """Constraints (8)-(10) from the outside: replayed from the outcomes alone, not from the core's own
    ledger.
    """
    outcomes = drive(BUSY, 1, machines())
    nodes = {node.node: node for node in BUSY.nodes(1, machines().profiles)}
    assert any(known(outcome.wait_s) > 0 for outcome in outcomes), "nobody waited: the test would prove nothing"
    stays = [(known(o.placement), known(o.started_s), known(o.ended_s)) for o in outcomes]
    for instant in sorted({start_s for _, start_s, _ in stays}):
        for name, edge in nodes.items():
            if edge.role is not Role.EDGE:
                continue
            there = [
                place for place, start_s, end_s in stays if place.edge == name and start_s <= instant < end_s - 1e-9
            ]
            assert sum(place.uses_slot for place in there) <= edge.slots
            assert sum(place.link1_bps for place in there) <= edge.link1_capacity_bps
            assert sum(place.link2_bps for place in there) <= edge.link2_capacity_bps


def test_the_same_seed_gives_the_same_outcomes_and_another_does_not() -> None:
    assert drive(BUSY, 5, machines()) == drive(BUSY, 5, machines())
    assert drive(BUSY, 5, machines()) != drive(BUSY, 6, machines())


def test_a_policy_without_delays_never_waits_for_an_edge() -> None:
    outcomes = drive(BUSY.varied(policy="no-delay"), 1, machines())
    assert all(outcome.wait_s == pytest.approx(0, abs=1e-9) for outcome in outcomes)


def test_waiting_pays_where_edges_are_scarce() -> None:
    """Algorithm 1's delayed start must be worth something on these tasks, or nothing tests it."""
    means = {
        policy: np.mean([delays_s(drive(BUSY.varied(policy=policy), seed, machines())) for seed in range(6)])
        for policy in ("deepar", "no-delay", "edge-only", "device-only")
    }
    assert means["deepar"] < means["edge-only"]
    assert means["deepar"] < means["device-only"]
    waited = [known(o.wait_s) > 0 for seed in range(6) for o in drive(BUSY, seed, machines())]
    assert 0.02 < np.mean(waited) < 0.9


def test_streaming_is_never_slower_than_one_sample_at_a_time() -> None:
    alone = Scenario(devices=8, edges=8, reachable=None, within_s=2000)
    sequential = delays_s(drive(alone, 2, machines()))
    pipelined = delays_s(drive(alone.varied(objective="pipelined"), 2, machines()))
    for one, other in zip(sequential, pipelined, strict=True):
        assert other <= one + 1e-9
    assert sum(pipelined) < 0.8 * sum(sequential)


def test_noise_changes_delays() -> None:
    noisy = BUSY.varied(noise=0.3)
    assert drive(noisy, 1, machines()) == drive(noisy, 1, machines())
    outcomes = drive(noisy, 1, machines())
    assert all(outcome.state is TaskState.COMPLETED for outcome in outcomes)
    ratios = [math.log(known(o.device_delay_s) / known(o.predicted_delay_s)) for o in outcomes]
    assert np.std(ratios) == pytest.approx(0.3, rel=0.35)


def test_a_tasks_noise_is_the_same_under_every_policy() -> None:
    found = []
    for policy in ("deepar", "device-only"):
        outcomes = drive(BUSY.varied(noise=1.0, policy=policy), 1, machines())
        found.append([known(o.device_delay_s) / known(o.predicted_delay_s) for o in outcomes])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_planner_that_learns_predicts_better_where_speeds_are_not_as_declared() -> None:
    errors = {}
    for learn in (False, True):
        outcomes = drive(BUSY.varied(drift=0.7, learn=learn, devices=6, tasks=120, within_s=600), 2, machines())
        assert all(outcome.state is TaskState.COMPLETED for outcome in outcomes)
        later = outcomes[40:]
        errors[learn] = np.median([abs(known(o.device_delay_s) / known(o.predicted_delay_s) - 1) for o in later])
    assert errors[False] > 0.2
    assert errors[True] < 0.75 * errors[False]


def test_deadlines_expire_in_virtual_time() -> None:
    outcomes = drive(BUSY.varied(deadline_s=3, noise=1.0), 2, machines())
    turned_away = [outcome for outcome in outcomes if outcome.state is TaskState.REJECTED]
    assert turned_away
    assert {(outcome.cause, outcome.ended_s) for outcome in turned_away} == {
        ("deadline", outcome.scheduled_s) for outcome in turned_away
    }
    late = [outcome for outcome in outcomes if outcome.state is TaskState.EXPIRED]
    assert late
    for outcome in late:
        assert outcome.ended_s == pytest.approx(outcome.scheduled_s + 3)
        assert outcome.delay_s is None


def test_entries_may_be_a_generator_and_rejected_tasks_end() -> None:
    ended: list[Outcome] = []
    run = Drive(core_for(BUSY), ended.append)
    run.announce(BUSY.nodes(0, machines().profiles))

    def entries() -> Iterator[Entry]:
        for index in range(5):
            task = TaskSubmitted(
                task_id=f"t-{index}", device="device-00001", model="nothing", samples=1, input=SeedInput(seed=0)
            )
            yield Entry(at_s=float(index), task=task)

    run.run(entries())
    assert [outcome.state for outcome in ended] == [TaskState.REJECTED] * 5
    assert {outcome.cause for outcome in ended} == {"unknown_model"}


def test_a_policy_that_fails_ends_the_simulation_with_its_name_and_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = [
        "class Broken:",
        '    name = "broken"',
        "    def place(self, algorithm):",
        "        return algorithm.bets()",
    ]
    (tmp_path / "failing_policies.py").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PolicyError, match=r"policy broken \(failing_policies.py:4\): AttributeError: .* 'bets'"):
        drive(BUSY.varied(policy="failing_policies:Broken"), 3, machines())


Stay = tuple[str, Placement, float, float, float]
"""What a task held, by the records alone: task, placement, from when until when, and when it was predicted to end."""


def stays_of(scenario: Scenario, seed: int) -> tuple[list[Outcome], list[Stay]]:
    """Run a scenario, and keep books of what runs where."""
    core, outcomes = core_for(scenario), list[Outcome]()
    run = Drive(core, outcomes.append)
    placed: dict[str, Placed] = {}
    now_at: dict[str, tuple[Placement, float, float]] = {}
    stays: list[Stay] = []
    handle = core.handle

    def watched(event: Event, now: float) -> list[Change]:
        changes = handle(event, now)
        for change in changes:
            if isinstance(change, Placed):
                placed[change.task_id] = change
            elif isinstance(change, Start):
                first = placed[change.task_id]
                now_at[change.task_id] = first.placement, now, now + first.delay_s
            elif isinstance(change, Rerouted | Ended):
                stays.append((change.task_id, *now_at[change.task_id][:2], now, now_at[change.task_id][2]))
                if isinstance(change, Rerouted):
                    now_at[change.task_id] = change.placement, now, change.from_s + change.delay_s
        return changes

    core.handle = watched  # type: ignore[method-assign]
    run.announce(scenario.nodes(seed, machines().profiles))
    run.run(scenario.schedule(seed).entries)
    return outcomes, stays


@pytest.mark.parametrize("seed", [1, 2])
def test_rerouted_tasks_never_over_book_an_edge(seed: int) -> None:
    """(8)-(10) at every instant at which something begins, by the second books."""
    busy = replace(BUSY, policy="elastic", objective=Objective.PIPELINED, edge_link2_bps=(5e7, 3e8))
    _, stays = stays_of(busy, seed)
    tasks = [stay[0] for stay in stays]
    assert len(tasks) > len(set(tasks)), "no task was rerouted: the test would prove nothing"
    for name, edge in {node.node: node for node in busy.nodes(seed, machines().profiles)}.items():
        if edge.role is not Role.EDGE:
            continue
        here = [stay for stay in stays if stay[1].edge == name]
        for instant in {stay[2] for stay in here}:
            there = [place for _, place, begin_s, end_s, _ in here if begin_s <= instant < end_s]
            assert sum(place.uses_slot for place in there) <= edge.slots
            assert sum(place.link1_bps for place in there) <= edge.link1_capacity_bps
            assert sum(place.link2_bps for place in there) <= edge.link2_capacity_bps


def test_a_rerouted_task_ends_by_what_was_left_of_it() -> None:
    """When its latest change predicted; its delay and parts are those of the whole task."""
    outcomes, stays = stays_of(replace(BUSY, policy="elastic", objective=Objective.PIPELINED), 1)
    last = {stay[0]: stay for stay in stays}
    assert len(stays) - len(last) > 3
    for outcome in outcomes:
        *_, ended_s, predicted_s = last[outcome.task_id]
        assert ended_s == predicted_s
        assert known(outcome.predicted_delay_s) == pytest.approx(known(outcome.device_delay_s))
        assert known(outcome.measured).model_dump() == pytest.approx(known(outcome.predicted).model_dump())
        assert known(outcome.placement) == last[outcome.task_id][1]


def test_rerouting_pays_where_many_devices_share_edges() -> None:
    crowded = Scenario(devices=200, edges=10, within_s=50.0, objective=Objective.PIPELINED)
    means_s = {
        policy: np.mean(
            [delays_s(drive(replace(crowded, policy=policy), seed, platforms("paper"))) for seed in (1, 2, 3)]
        )
        for policy in ("deepar", "elastic")
    }
    assert means_s["elastic"] < 0.98 * means_s["deepar"]


def test_a_rerouted_task_takes_what_it_really_takes_where_predictions_are_wrong() -> None:
    noisy = replace(BUSY, policy="elastic", objective=Objective.PIPELINED, noise=0.3)
    outcomes = drive(noisy, 1, machines())
    assert all(outcome.state is TaskState.COMPLETED for outcome in outcomes)
    errors = [known(o.device_delay_s) / known(o.predicted_delay_s) - 1 for o in outcomes]
    assert max(errors) > 0.05
    assert min(errors) < -0.05


@pytest.mark.parametrize(
    ("devices", "tasks", "within_s", "least"),
    [(80, 80, 300.0, 0.15), (200, 200, 50.0, 0.15), (20, 200, 50.0, 0.0), (10, 80, 300.0, 0.1)],
    ids=["one task a device", "crowded", "crowded, several tasks a device", "several tasks a device"],
)
def test_several_routes_pay_on_figure_4s_tasks_also_where_tasks_share_a_device(
    devices: int, tasks: int, within_s: float, least: float
) -> None:
    """Targets of `routes` against `deepar` with the same objective; the 99th percentile must not rise."""
    scenario = Scenario(devices=devices, tasks=tasks, within_s=within_s, objective=Objective.PIPELINED)
    delays = {
        policy: np.concatenate(
            [delays_s(drive(replace(scenario, policy=policy), seed, platforms("paper"))) for seed in (100, 101)]
        )
        for policy in ("deepar", "routes")
    }
    assert delays["routes"].mean() <= (1.0 - least) * delays["deepar"].mean()
    assert np.percentile(delays["routes"], 99) <= np.percentile(delays["deepar"], 99)
