"""Cross-check of the figures: one seed of each on the full simulator, compared with the core-only driver.

The figures use the driver, which replaces the stages with predicted times. The full simulator runs the real shells on
the same scenario and must give the same placements and delays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loadgen.experiments.figures_multi import SETTINGS
from loadgen.experiments.figures_single import BARS, FIG3_MODELS, one_task_scenario
from loadgen.sim.core_driver import drive
from loadgen.sim.platforms import platforms
from loadgen.sim.scenario import Scenario
from loadgen.sim.simulator import simulate

WITHIN = 0.01
"""Maximum relative difference of the mean delays."""

FIRST_FRAME_S = 0.0005
"""Difference of the mean delays that is accepted even if it is more than `WITHIN`.

A task's first frame also carries its plan, about 600 bytes that the cost model ignores. At Figure 3's 18 Mbps they take 0.25
ms, which matters only for LeNet, whose input has 1 kB.
"""

MIN_SAME = 0.95
"""Minimum share of tasks with the same kind, edge and cuts."""


@dataclass(frozen=True, slots=True)
class FigureCheck:
    """Comparison of one scenario on both simulators."""

    figure: str
    case: str  # bar of the figure
    tasks: int
    same_placement: float  # share of the tasks with the same kind, edge and cuts
    mean_ratio: float  # mean delay on the full simulator divided by that on the driver
    mean_difference_s: float  # mean delay on the full simulator minus that on the driver
    largest_error: float  # largest relative error of a task's delay
    seconds: float  # wall-clock seconds of the full simulator

    @property
    def passed(self) -> bool:
        """Whether placements are the same except for near ties, and delays agree within a percent."""
        near = abs(self.mean_ratio - 1) <= WITHIN or abs(self.mean_difference_s) <= FIRST_FRAME_S
        return self.same_placement >= MIN_SAME and near

    def as_row(self) -> dict[str, Any]:
        """The row of the report, as JSON values."""
        return {
            "figure": self.figure,
            "case": self.case,
            "tasks": self.tasks,
            "same_placement": self.same_placement,
            "mean_ratio": self.mean_ratio,
            "mean_difference_s": self.mean_difference_s,
            "largest_error": self.largest_error,
            "seconds": self.seconds,
            "pass": self.passed,
        }


def check_figures(
    *, devices: int = 20, seed: int = 0, profile: str = "paper", say: Callable[[str], None] = lambda line: None
) -> list[FigureCheck]:
    """Check every bar of Figures 1(a) and 3, and `deepar` in each of Figure 4's settings with `devices` devices."""
    found = []
    platform = platforms(profile)
    for figure, models in (("fig1a", ("alexnet",)), ("fig3", tuple(FIG3_MODELS))):
        for model in models:
            for policy in BARS:
                say(f"{figure}: {model}, {policy}")
                scenario = one_task_scenario(platform, model, policy, profile=profile)
                found.append(check(figure, f"{model}, {policy}", scenario, seed))
    for name, setting in SETTINGS.items():
        say(f"{name}: {devices} devices")
        scenario = Scenario(name=name, devices=devices, edges=setting.edges, within_s=setting.within_s, profile=profile)
        found.append(check(name, f"{devices} devices, deepar", scenario, seed))
    return found


def check(figure: str, case: str, scenario: Scenario, seed: int) -> FigureCheck:
    """Run one scenario on both simulators."""
    platform = platforms(scenario.profile, codecs=scenario.codecs)
    expected = drive(scenario, seed, platform)
    began_s = time.perf_counter()
    found = simulate(scenario, seed, platform).outcomes
    seconds = time.perf_counter() - began_s
    pairs = list(zip(expected, found, strict=True))
    same = sum(one.where == other.where for one, other in pairs) / len(pairs)
    delays = [(one.delay_s or 0.0, other.delay_s or 0.0) for one, other in pairs]
    means = [sum(column) / len(delays) for column in zip(*delays, strict=True)]
    largest = max(abs(other / one - 1) for one, other in delays)
    return FigureCheck(figure, case, len(pairs), same, means[1] / means[0], means[1] - means[0], largest, seconds)
