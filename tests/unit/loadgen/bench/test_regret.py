"""The regret benchmark: what it computes, which tasks it plays, and the policy that a task's name selects."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from bus.errors import UnknownNameError
from bus.messages import Placed, TaskState
from bus.values import Kind, Placement
from deploy.services.paired_regions import RegionPair
from loadgen.bench.choices import regret
from loadgen.bench.choices.policy_by_name import task_name
from loadgen.bench.choices.regret import FIXED, LEARNING, NETWORKS, Cell, Run, every_cell, quick_cells
from loadgen.bench.choices.rounds import Effort, TaskNotCompletedError, play_rounds, run_of
from loadgen.replay.outcome import Outcome
from planner.core.core import PlannerCore
from tests.unit.planner.scenes import cloud, device, edge, only, task

CELL = Cell(NETWORKS[0], "lenet", 10)


def runs_of(*delays_s: float, predicted_s: float = 1.0) -> list[Run]:
    return [Run(delay_s, delay_s + 0.5, predicted_s, "edge 0/7") for delay_s in delays_s]


def test_a_cell_is_judged_before_and_after_learning() -> None:
    runs = {
        LEARNING: runs_of(4.0, 4.0, 4.0, 4.0, 4.0, 1.1, 1.3, predicted_s=2.0),
        "device-only": runs_of(2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0),
        "edge-only": runs_of(3.0, 3.0, 3.0, 3.0, 3.0, 1.0, 1.0),
        "cloud-only": runs_of(9.0, 9.0),
    }
    row = regret.judge(CELL, runs)
    assert (row["network"], row["model"], row["samples"]) == ("lan", "lenet", 10)
    assert row["regret_first_s"] == pytest.approx(2.0)
    assert row["regret_first"] == pytest.approx(2.0)  # over device-only, the best of the first five
    assert row["regret"] == pytest.approx(1.2)  # over edge-only, the best later
    assert row["regret_s"] == pytest.approx(0.2)
    assert row["best_policy"] == "edge-only"
    assert row["error_first"] == pytest.approx(1.0)
    assert row["error"] == pytest.approx((0.45 + 0.35) / 2)
    assert row["error_s"] == pytest.approx((0.9 + 0.7) / 2)
    assert row["tasks"] == 7


@pytest.mark.parametrize(
    ("delays_s", "missed"),
    [
        ((1.04, 1.04), []),  # within five percent
        ((1.2, 1.2), ["regret", "error"]),
    ],
)
def test_aims_are_relative_for_long_tasks(delays_s: tuple[float, ...], missed: list[str]) -> None:
    runs = {LEARNING: runs_of(*[1.0] * 5, *delays_s), "edge-only": runs_of(*[1.0] * 7)}
    found = regret.aims([regret.judge(CELL, runs)])
    assert [aim["name"].rpartition(" ")[2] for aim in found if not aim["pass"]] == missed
    assert [aim["name"] for aim in found] == [f"lan lenet x10: {key}" for key in ("regret", "error", "regret_first")]


def test_aims_allow_milliseconds_for_short_tasks() -> None:
    def missed(later_s: float) -> list[str]:
        runs = {
            LEARNING: runs_of(*[0.010] * 5, later_s, predicted_s=0.008),
            "edge-only": runs_of(*[0.010] * 6),
        }
        aims = regret.aims([regret.judge(CELL, runs)])
        return [aim["name"].rpartition(" ")[2] for aim in aims if not aim["pass"]]

    assert missed(0.0129) == []
    assert missed(0.0132) == ["regret", "error"]


def test_a_policy_is_hopeless_when_even_its_fastest_task_is_slow() -> None:
    runs = {"device-only": runs_of(1.0, 1.0), "edge-only": runs_of(1.4, 9.0), "cloud-only": runs_of(1.6, 1.6)}
    assert regret.drop_hopeless(runs, 1.5) == {"cloud-only"}
    short = {policy: runs_of(*(run.delay_s / 100 for run in tasks)) for policy, tasks in runs.items()}
    assert regret.drop_hopeless(short, 1.5) == set()


def test_cells_are_all_combinations() -> None:
    cells = every_cell()
    assert len({str(cell) for cell in cells}) == len(cells) == 27
    assert [str(cell) for cell in every_cell(["lte"], ["lenet"], [1, 2])] == ["lte lenet x1", "lte lenet x2"]
    assert len(quick_cells()) == 4
    with pytest.raises(UnknownNameError, match=r"did you mean lan\?"):
        every_cell(["lann"])


def play(
    effort: Effort, delays_s: dict[str, float], seconds_a_task: float = 0.0
) -> tuple[dict[str, list[Run]], list[str]]:
    """The rounds with fixed delays, and the policies in the order of their tasks."""
    order: list[str] = []

    async def one(policy: str, number: int) -> Run:
        order.append(policy)
        return runs_of(delays_s[policy])[0]

    runs = asyncio.run(play_rounds(one, effort, clock=lambda: len(order) * seconds_a_task))
    return runs, order


def test_rounds_alternate_and_each_policy_goes_first_in_turn() -> None:
    policies = [LEARNING, *FIXED]
    runs, order = play(Effort(tasks=5), dict.fromkeys(policies, 1.0))
    assert {policy: len(tasks) for policy, tasks in runs.items()} == dict.fromkeys(policies, 5)
    rounds = [order[start : start + 5] for start in range(0, 25, 5)]
    assert all(sorted(each) == sorted(policies) for each in rounds)
    assert sorted(each[0] for each in rounds) == sorted(policies)


def test_hopeless_policies_are_not_run_again_but_the_learning_one_is() -> None:
    delays_s = {LEARNING: 9.0, "device-only": 1.0, "edge-only": 1.2, "cloud-only": 2.0, "neurosurgeon": 2.0}
    runs, order = play(Effort(tasks=6, hopeless_after=2), delays_s)
    assert Counter(order) == {LEARNING: 6, "device-only": 6, "edge-only": 6, "cloud-only": 2, "neurosurgeon": 2}
    assert regret.judge(CELL, runs)["best_policy"] == "device-only"


def test_a_regret_has_a_standard_error() -> None:
    runs = {LEARNING: runs_of(*[1.0] * 5, 2.0, 4.0), "edge-only": runs_of(*[1.0] * 5, 2.0, 2.0)}
    row = regret.judge(CELL, runs)
    assert row["regret"] == pytest.approx(1.5)
    assert row["regret_se"] == pytest.approx(0.5)  # 3 +- 1 over 2
    assert row["regret_first_se"] == 0.0
    runs["edge-only"] = runs_of(*[1.0] * 5, 1.0, 3.0)
    assert regret.judge(CELL, runs)["regret_se"] == pytest.approx(1.5 * (1 / 9 + 1 / 4) ** 0.5)


@pytest.mark.parametrize(
    ("ours_s", "others_s", "enough"),
    [
        ([1.0, 1.0], [1.0, 1.0], True),
        ([1.2, 1.2], [1.0, 1.0], True),  # a miss is as certain as a success
        ([1.0, 1.1], [1.0, 1.0], False),
        ([1.0, 1.0], [0.9, 1.1], False),
        ([0.5, 0.6], [1.0, 1.2], True),
        ([0.003, 0.004], [0.003, 0.003], True),  # milliseconds are allowed
        ([0.003, 0.010], [0.003, 0.003], False),
    ],
)
def test_a_cell_whose_tasks_differ_needs_more_of_them(ours_s: list[float], others_s: list[float], enough: bool) -> None:
    runs = {LEARNING: runs_of(*[9.0] * 5, *ours_s), "edge-only": runs_of(*[9.0] * 5, *others_s)}
    assert regret.known(runs) is enough


def test_more_rounds_are_played_until_the_regret_is_known() -> None:
    delays_s = {LEARNING: 1.0, "device-only": 1.0}
    noise_s = [0.0, 0.4, -0.4]

    def rounds(effort: Effort, noisy: int) -> int:
        """How many rounds are played where this many of the first ones are noisy."""

        async def one(policy: str, number: int) -> Run:
            delay_s = delays_s.get(policy, 3.0)
            return runs_of(delay_s + (noise_s[number % 3] if number < noisy and policy == LEARNING else 0.0))[0]

        return len(asyncio.run(play_rounds(one, effort, clock=lambda: 0.0))[LEARNING])

    assert rounds(Effort(tasks=8, most_tasks=100), 0) == 8
    assert 8 < rounds(Effort(tasks=8, most_tasks=100), 12) < 100
    assert rounds(Effort(tasks=8, most_tasks=20), 20) == 20


def test_a_slow_cell_ends_after_its_time_but_not_before_its_least_tasks() -> None:
    even = dict.fromkeys([LEARNING, *FIXED], 1.0)
    assert len(play(Effort(tasks=20, least_tasks=7, limit_s=40.0), even, seconds_a_task=10.0)[0][LEARNING]) == 7
    assert len(play(Effort(tasks=20, least_tasks=7, limit_s=40.0), even, seconds_a_task=1.0)[0][LEARNING]) == 9


def test_a_task_that_fails_ends_the_benchmark() -> None:
    failed = Outcome("t1", "lenet", "d1", 1, 0.0, state=TaskState.FAILED, cause="no_node")
    with pytest.raises(TaskNotCompletedError, match="t1 did not complete: FAILED no_node"):
        run_of(failed)


def test_a_finished_task_is_kept_with_its_prediction() -> None:
    place = Placement(kind=Kind.EDGE, edge="e1", cut1=0, cut2=7, cut1_name="input", cut2_name="fc_3", link1_bps=1000)
    outcome = Outcome("t1", "lenet", "d1", 1, 1.0, state=TaskState.COMPLETED, placement=place)
    outcome.ended_s, outcome.device_delay_s, outcome.predicted_delay_s = 1.75, 0.5, 0.4
    assert run_of(outcome) == Run(0.5, 0.75, 0.4, "edge 0/7")


@pytest.mark.parametrize(
    ("policy", "kind"), [("device-only", Kind.DEVICE), ("edge-only", Kind.EDGE), ("cloud-only", Kind.CLOUD)]
)
def test_a_task_s_name_selects_its_policy(policy: str, kind: Kind) -> None:
    core = PlannerCore(0, "loadgen.bench.choices.policy_by_name:PolicyByName")
    for node in (edge(), cloud(), device()):
        core.handle(node, 0.0)
    placed = only(core.handle(task(task_name("lan-lenet-x10-0", policy)), 0.0), Placed)
    assert placed.placement.kind is kind


def test_both_regions_of_a_cell_are_alike_but_for_the_policy(tmp_path: object) -> None:
    pair = RegionPair(NETWORKS[1], "lenet", 4)
    commands = {name: words for name, (_, words) in pair.commands(tmp_path).items()}  # type: ignore[arg-type]
    assert set(commands) == {"p4", "d4", "e4", "c4", "p5", "d5", "e5", "c5"}
    for role in "dec":
        renamed = [word.replace("5", "4") if word in ("d5", "e5", "c5", "5") else word for word in commands[f"{role}5"]]
        assert renamed == commands[f"{role}4"]
    assert "--policy" in commands["p5"]
    assert "--policy" not in commands["p4"]
    assert {NETWORKS[1].link1, NETWORKS[1].link1_latency} < set(commands["d4"])
    assert NETWORKS[1].link2_latency in commands["e4"]
    assert NETWORKS[1].link2_latency in commands["c4"]
