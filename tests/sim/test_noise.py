"""What learning costs where there is little to learn: tasks of a large region whose times follow nobody's prediction.

A region of 200 devices, each with one task; speeds that wander by a third; times with a log-normal factor for each task.
"""

from __future__ import annotations

from statistics import fmean

import pytest

from loadgen.experiments.robustness import NOT_WAITING, SCENARIO
from loadgen.experiments.runs import Cell, run_cell

SEEDS = range(300, 306)


def mean_delay_s(noise: float, learn: bool) -> float:
    scenario = SCENARIO.varied(policy=NOT_WAITING, noise=noise, learn=learn)
    return fmean(run_cell(Cell(scenario, seed))["mean_delay_s"] for seed in SEEDS)


@pytest.mark.parametrize(("noise", "most"), [(0.0, 1.01), (1.0, 1.06)])
def test_learning_costs_little_where_times_say_little(noise: float, most: float) -> None:
    assert mean_delay_s(noise, learn=True) < most * mean_delay_s(noise, learn=False)
