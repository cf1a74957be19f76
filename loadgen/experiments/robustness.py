"""Whether waiting pays when predictions are wrong: `deepar` against `no-delay` on the same tasks, noise and drift.

Both policies learn alike, so the only difference is whether a task may wait for an edge. A seed's gain is the reduction of
the mean delay by waiting, in percent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final

from bus.errors import ConfigError
from loadgen.experiments.runs import Cell, Progress, Row, Workers, run_cell, run_cells
from loadgen.replay.metrics import half_width_95
from loadgen.sim.scenario import Scenario

WAITING: Final = "deepar"
NOT_WAITING: Final = "no-delay"
WORST_PERCENT: Final = -5.0
"""The largest loss of a single seed that passes."""
SCENARIO: Final = Scenario(name="robustness", devices=200, noise=1.0, drift=0.3, learn=True)
"""The default: Figure 4's region with 200 devices, predictions off by a factor of 2.7, speeds that wander by a third."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustnessOptions:
    """The runs."""

    scenario: Scenario = SCENARIO  # its policy is replaced
    seeds: tuple[int, ...] = tuple(range(10, 40))
    jobs: int = 1
    run: Callable[[Cell], Row] = run_cell  # runs one cell
    progress: Progress | None = None  # (runs done, runs in all)


@dataclass(frozen=True, slots=True)
class SeedGain:
    """What waiting gained with one seed."""

    seed: int
    waiting_s: float  # mean delay with waiting
    not_waiting_s: float  # mean delay without
    waited: float  # share of the tasks that waited
    gain: float = field(init=False)  # reduction in percent; negative: waiting cost time

    def __post_init__(self) -> None:
        object.__setattr__(self, "gain", 100.0 * (1.0 - self.waiting_s / self.not_waiting_s))


@dataclass(frozen=True, slots=True)
class Robustness:
    """The result of the experiment."""

    scenario: Scenario
    gains: tuple[SeedGain, ...]  # by seed

    @property
    def mean(self) -> float:
        """Mean gain over the seeds, in percent."""
        return fmean(one.gain for one in self.gains)

    @property
    def ci95(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean; None for a single seed."""
        half = half_width_95([one.gain for one in self.gains])
        return None if half is None else (self.mean - half, self.mean + half)

    @property
    def worst(self) -> SeedGain:
        """The seed with which waiting gained least."""
        return min(self.gains, key=lambda one: one.gain)

    @property
    def passed(self) -> bool:
        """Whether waiting costs nothing on the mean, and at most 5 % with the worst seed."""
        return self.mean >= 0.0 and self.worst.gain >= WORST_PERCENT

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        scenario = self.scenario
        return {
            "devices": scenario.devices,
            "noise": scenario.noise,
            "drift": scenario.drift,
            "learn": scenario.learn,
            "within_s": scenario.within_s,
            "gain_mean": self.mean,
            "gain_ci95": None if self.ci95 is None else list(self.ci95),
            "gain_worst": self.worst.gain,
            "worst_seed": self.worst.seed,
            "waited_share": fmean(one.waited for one in self.gains),
            "pass": self.passed,
            "seeds": [
                {
                    "seed": one.seed,
                    "deepar_s": one.waiting_s,
                    "no_delay_s": one.not_waiting_s,
                    "gain": one.gain,
                    "waited_share": one.waited,
                }
                for one in self.gains
            ],
        }


def robustness(options: RobustnessOptions) -> Robustness:
    """Run both policies with every seed. Raises `ConfigError`."""
    if not options.seeds:
        raise ConfigError("no seed is given", remedy="use --seeds 30")
    cells = [
        Cell(options.scenario.varied(policy=policy), seed)
        for policy in (WAITING, NOT_WAITING)
        for seed in options.seeds
    ]
    rows = run_cells(cells, Workers(options.jobs, None, options.run), options.progress)
    count = len(options.seeds)
    gains = [
        SeedGain(seed, with_["mean_delay_s"], without["mean_delay_s"], with_["delayed_share"])
        for seed, with_, without in zip(options.seeds, rows[:count], rows[count:], strict=True)
    ]
    return Robustness(options.scenario, tuple(gains))
