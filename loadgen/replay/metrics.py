"""Statistics over task outcomes (means, percentiles, confidence intervals, per model and per kind) and thresholds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bus.messages import TaskState
from bus.text.units import format_seconds
from loadgen.replay.outcome import Outcome

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99_9": 99.9}
"""Name in reports -> percentile, interpolated linearly (numpy's default)."""


def distribution(values: Sequence[float]) -> dict[str, float | None]:
    """`mean`, `p50`, `p90`, `p99`, `p99_9`, `min`, `max`; all None if `values` is empty."""
    if not values:
        return dict.fromkeys(("mean", *PERCENTILES, "min", "max"))
    array = np.asarray(values, dtype=float)
    found = np.percentile(array, list(PERCENTILES.values()))
    return {
        "mean": float(array.mean()),
        **{name: float(value) for name, value in zip(PERCENTILES, found, strict=True)},
        "min": float(array.min()),
        "max": float(array.max()),
    }


def half_width_95(values: Sequence[float]) -> float | None:
    """Half-width of the 95 % confidence interval of the mean (Student's t); None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy import special  # imported late: loading scipy would slow down every command

    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return spread * float(special.stdtrit(len(values) - 1, 0.975))


def summary(outcomes: Iterable[Outcome], *, seed: int) -> dict[str, Any]:
    """The object that `deepar loadgen replay --json` prints, without `files`.

    Warm-up tasks are only counted in `warmup`. `submitted` counts the tasks handed to the bus; `unfinished` counts
    the tasks that had not ended when the replay stopped reading.
    """
    everything = list(outcomes)
    counted = [outcome for outcome in everything if not outcome.warmup]
    states = Counter(outcome.state for outcome in counted)
    done = [outcome for outcome in counted if outcome.delay_s is not None]
    policies = sorted({outcome.policy for outcome in counted if outcome.policy})
    last = max((outcome.ended_s for outcome in done if outcome.ended_s is not None), default=None)
    first = min((outcome.scheduled_s for outcome in counted), default=0.0)
    duration_s = None if last is None else last - first
    return {
        "seed": seed,
        "policy": policies[0] if len(policies) == 1 else "+".join(policies) or "none",
        "submitted": sum(outcome.submitted_s is not None for outcome in counted),
        "completed": states[TaskState.COMPLETED],
        "rejected": states[TaskState.REJECTED],
        "failed": states[TaskState.FAILED],
        "expired": states[TaskState.EXPIRED],
        "unfinished": states[None],
        "warmup": len(everything) - len(counted),
        "causes": dict(Counter(outcome.cause for outcome in counted if outcome.cause).most_common()),
        "delay_s": distribution(_present(outcome.delay_s for outcome in done)),
        "wait_s": distribution(_present(outcome.wait_s for outcome in done)),
        "submit_lag_s": distribution(
            [outcome.submitted_s - outcome.scheduled_s for outcome in counted if outcome.submitted_s is not None]
        ),
        "by_kind": _groups(done, lambda outcome: outcome.kind),
        "by_model": _groups(done, lambda outcome: outcome.model),
        "duration_s": duration_s,
        "samples_per_s": sum(outcome.samples for outcome in done) / duration_s if duration_s else None,
    }


def _groups(done: Sequence[Outcome], key: Callable[[Outcome], str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[float]] = {}
    for outcome in done:
        if outcome.delay_s is not None:
            groups.setdefault(key(outcome), []).append(outcome.delay_s)
    rows = {}
    for name in sorted(groups):
        found = distribution(groups[name])
        rows[name] = {
            "tasks": len(groups[name]),
            "mean_delay_s": found["mean"],
            **{f"{percentile}_s": found[percentile] for percentile in PERCENTILES},
        }
    return rows


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


@dataclass(frozen=True, slots=True)
class Threshold:
    """An upper limit on a delay statistic; a run that exceeds it exits with code 99."""

    name: str  # name of the option without dashes, e.g. "max-p99"
    statistic: str  # a key of the summary's `delay_s`
    limit_s: float

    def missed(self, report: dict[str, Any]) -> str | None:
        """A message if the run exceeded the limit, else None. A run without completed tasks exceeds every limit."""
        value = report["delay_s"][self.statistic]
        if value is None:
            return f"--{self.name} {format_seconds(self.limit_s)}: no task completed"
        if value > self.limit_s:
            return f"--{self.name} {format_seconds(self.limit_s)}: it was {format_seconds(value)}"
        return None
