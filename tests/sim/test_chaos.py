"""Faults on the real shells in virtual time; and planted bugs, which the same seeds must find.

`DEEPAR_CHAOS_SEEDS` runs more seeds than every change needs.
"""

from __future__ import annotations

import os

import pytest

from loadgen import chaos
from loadgen.chaos import ChaosScenario, run_seed
from loadgen.chaos_canaries import CANARIES, Canary

SEEDS = int(os.environ.get("DEEPAR_CHAOS_SEEDS", "60"))
BLOCK = 20


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_whatever_breaks_the_region_converges_and_no_guarantee_is_broken(first: int) -> None:
    found = chaos.run(range(first, min(first + BLOCK, SEEDS)))
    assert not found["violations"], "\n".join(
        f"{v['guarantee']} {v['what']}: {v['replay']}" for v in found["violations"]
    )
    assert found["retries"] > 0, "nothing had to be planned again: the faults were too mild"
    assert found["suppressed_duplicates"] > 0, "nothing came twice: the faults were too mild"
    assert sum(found["states"].values()) == found["seeds"] * ChaosScenario().tasks


def test_the_same_seed_gives_the_same_trace_twice() -> None:
    first = run_seed(7)
    assert first == run_seed(7)
    assert len(first.trace) > 50
    assert first.trace != run_seed(8).trace


def test_clocks_that_are_off_by_hours_change_nothing() -> None:
    right = run_seed(3, scenario=ChaosScenario(clock_off_s=0.0))
    assert right.trace == run_seed(3, scenario=ChaosScenario(clock_off_s=7200.0)).trace


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name.replace(" ", "_"))
def test_a_planted_bug_is_caught(canary: Canary) -> None:
    with canary.planted():
        for seed in range(canary.within):
            if run_seed(seed, scenario=ChaosScenario(converge_s=60.0)).violations:
                return
    pytest.fail(f"{canary.what}: not caught within {canary.within} seeds")
