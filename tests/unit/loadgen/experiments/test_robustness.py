"""Whether waiting pays when predictions are wrong."""

from __future__ import annotations

import pytest

from loadgen.experiments.robustness import SCENARIO, RobustnessOptions, robustness
from loadgen.experiments.runs import Cell, Row


def test_the_gain_is_the_reduction_by_waiting_on_the_same_tasks() -> None:
    means = {("deepar", 1): 9.0, ("no-delay", 1): 10.0, ("deepar", 2): 10.4, ("no-delay", 2): 10.0}

    def run(cell: Cell) -> Row:
        assert (cell.scenario.noise, cell.scenario.drift, cell.scenario.learn) == (1.0, 0.3, True)
        return {"mean_delay_s": means[cell.scenario.policy, cell.seed], "delayed_share": 0.1}

    found = robustness(RobustnessOptions(seeds=(1, 2), run=run))
    assert [one.gain for one in found.gains] == pytest.approx([10.0, -4.0])
    assert found.mean == pytest.approx(3.0)
    assert found.worst.seed == 2
    assert found.passed
    means["deepar", 2] = 10.6
    assert not robustness(RobustnessOptions(seeds=(1, 2), run=run)).passed, "one seed loses more than 5 %"
    means["deepar", 2], means["deepar", 1] = 10.4, 9.7
    assert not robustness(RobustnessOptions(seeds=(1, 2), run=run)).passed, "waiting costs time on the mean"


def test_waiting_with_learned_deviations_gains_with_noise_and_drift() -> None:
    found = robustness(RobustnessOptions(scenario=SCENARIO.varied(devices=100, within_s=50), seeds=(10, 11, 12)))
    assert all(one.waited > 0 for one in found.gains), "nothing waits: the experiment says nothing"
    assert found.mean > 0
