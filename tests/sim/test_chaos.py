"""Faults on the real shells in virtual time; and planted bugs, which the same seeds must find.

`DEEPAR_CHAOS_SEEDS` sets the number of seeds: continuous integration runs 200.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.commands.simulate import figures
from loadgen.chaos.simulated import campaign, crash_points
from loadgen.chaos.simulated.campaign import run_seed
from loadgen.chaos.simulated.monitor import STAGE_S
from loadgen.chaos.simulated.region import LEASE_S, ChaosScenario
from loadgen.sim.programs import REAL, Programs
from tests.sim.canaries import CANARIES, HARMLESS, Canary, canary

SEEDS = int(os.environ.get("DEEPAR_CHAOS_SEEDS", "60"))
BLOCK = 20
ROLES = ("planner", "device", "edge", "cloud")
TOPICS = ("tasks", "events", "nodes", "decisions", "snapshots", "results", "activations.cloud", "activations.e1")
KINDS = {
    *(f"{kind} {role}" for kind in ("crash", "freeze", "freeze beyond a lease:", "cut", "terminate") for role in ROLES),
    *(
        f"bus {kind}"
        for kind in ("lost_ack", "lost_post", "duplicate", "rebalance", "redelivery", "stale_commit", "late")
    ),
    *(f"{kind} on {topic}" for kind in ("poison", "garbage") for topic in TOPICS),
    *(f"crash in a batch: {role}" for role in ("edge", "cloud")),
    "broker stop",
    "bus corrupt",
    "bus missing",
    "cancelled",
    "clock jumps",
    "codec bomb",
    "forged snapshot",
    "split",
    "stale record",
}


PLANS = {"placements_of_several_routes", "placements_with_codecs", "rerouted"}
"""What the tasks must meet beside the faults."""
BATCHES = {"computed", "process_killed", "bad_sample"}
"""What batches of samples of several tasks must meet."""


@pytest.fixture(scope="module")
def struck() -> set[str]:
    """Kinds of faults, of plans, and of what befell batches, that the blocks of seeds met."""
    return set()


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_whatever_breaks_the_region_converges_and_no_guarantee_is_broken(first: int, struck: set[str]) -> None:
    found = campaign.run(range(first, min(first + BLOCK, SEEDS)))
    assert not found["violations"], "\n".join(
        f"{v['guarantee']} {v['what']}: {v['replay']}" for v in found["violations"]
    )
    assert found["retries"] > 0, "nothing had to be planned again: the faults were too mild"
    assert found["suppressed_duplicates"] > 0, "nothing came twice: the faults were too mild"
    assert sum(found["states"].values()) == found["seeds"] * ChaosScenario().tasks
    assert found["replanned_s"]["times"] > 0
    assert found["sessions"] > 20
    assert found["frames"]["answered"] > 10 * found["sessions"]
    assert LEASE_S - STAGE_S < found["replanned_s"]["max"] <= LEASE_S + STAGE_S
    struck.update(found["faults"], (kind for kind in PLANS if found[kind]), found["batches_of_several_tasks"])


@pytest.mark.skipif(SEEDS < 200, reason="fewer seeds need not meet everything")
def test_every_kind_of_fault_struck(struck: set[str]) -> None:
    assert struck >= KINDS | PLANS | BATCHES


def test_killed_before_and_after_every_await() -> None:
    found = crash_points.sweep(0)
    assert not found["violations"], "\n".join(v["what"] for v in found["violations"])
    assert set(found["awaits"]) == set(ROLES)
    assert sum(found["awaits"].values()) > 150


def test_the_same_seed_gives_the_same_trace_twice() -> None:
    first = run_seed(7)
    assert first == run_seed(7)
    assert len(first.trace) > 50
    assert first.trace != run_seed(8).trace


def test_any_number_of_processes_gives_the_same_totals() -> None:
    told: list[tuple[int, int]] = []
    few = ChaosScenario(tasks=2, faults_s=5.0)
    found = campaign.run(range(24), scenario=few, jobs=2, progress=lambda done, total: told.append((done, total)))
    assert found == campaign.run(range(24), scenario=few)
    assert told[-1] == (24, 24)


@pytest.mark.parametrize("seed", [3, 12])
def test_clocks_that_are_off_by_minutes_and_jump_change_nothing(seed: int) -> None:
    right = run_seed(seed, scenario=ChaosScenario(clocks=False))
    assert right.trace == run_seed(seed).trace


def test_a_full_queue_rejects_and_does_not_grow() -> None:
    found = campaign.run(range(500, 510), scenario=ChaosScenario(max_waiting=1))
    assert not found["violations"], found["violations"]
    assert found["rejected_queue_full"] >= 10
    assert found["states"]["COMPLETED"] >= 10


CAUGHT_BEFORE = {
    "batch loses a sample": 4,
    "batch mixes up two tasks": 7,
    "bad sample spreads": 8,
    "never sent again": 4,
    "no dedup": 3,
    "old shares after a reroute": 5,
    "route ignored": 5,
    "told once": 17,
    "watermark drops a frame": 4,
}
"""Seeds that caught a bug, and are tried first; all others follow, for a change of the programs changes what a seed does."""


@pytest.mark.parametrize("bug", CANARIES, ids=lambda bug: bug.name.replace(" ", "_"))
def test_a_planted_bug_is_caught(bug: Canary) -> None:
    for seed in (CAUGHT_BEFORE.get(bug.name, 0), *range(bug.within)):
        if run_seed(seed, programs=bug.programs).violations:
            return
    pytest.fail(f"{bug.what}: not caught within {bug.within} seeds")


def test_results_of_a_fenced_attempt_do_no_harm() -> None:
    tasks_only = ChaosScenario(cameras=0.0)
    assert not campaign.run(range(10), scenario=tasks_only, programs=HARMLESS.programs)["violations"]


# --- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments: str, programs: Programs = REAL) -> tuple[int, str]:
    result = CliRunner().invoke(figures.app, ["chaos", *arguments], obj=programs)
    return result.exit_code, result.stdout


def test_the_command_prints_one_object() -> None:
    code, out = invoke("--seeds", "2", "--jobs", "1", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["seeds"] == 2
    assert found["simulated_hours"] > 0
    assert found["violations"] == []


def test_a_violation_comes_with_the_command_that_shows_it(tmp_path: Path) -> None:
    bug = canary("no dedup")
    programs = bug.programs
    code, out = invoke("--seeds", str(bug.within), "--jobs", "1", "--json", programs=programs)
    first = json.loads(out)["violations"][0]
    assert code == 1
    assert first["replay"] == f"deepar simulate chaos --seeds 1 --seed {first['seed']} --trace -"
    trace = tmp_path / "trace"
    code, _ = invoke("--seeds", "1", "--seed", str(first["seed"]), "--trace", str(trace), programs=programs)
    assert code == 1
    lines = trace.read_text(encoding="utf-8").splitlines()
    assert any("VIOLATION" in line and first["what"] in line for line in lines)
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times)
    assert any("fault" in line for line in lines)


def test_a_trace_is_of_one_seed() -> None:
    assert invoke("--seeds", "2", "--trace", "-")[0] != 0
