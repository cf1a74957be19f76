"""How much lower the delays of a policy are than those of another one on the same tasks, with bootstrap intervals.

Each seed gives one pair of runs. A gain is the share by which the mean over the seeds is lower; the interval comes from
drawing as many pairs again and again, with replacement, from a generator with a fixed seed, so that the same rows give the
same interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from loadgen.experiments.figure_result import RAW

AGAINST: Final = (RAW, "deepar")
"""The policies with which others are compared: the first that was run, or else the first of all."""

RESAMPLES: Final = 4_000
_MEASURES: Final = ("mean_delay_s", "p99_s")


@dataclass(frozen=True, slots=True)
class Gain:
    """By how much a measure is lower, as a share of the other policy's."""

    share: float  # below 0: it is higher
    ci95: tuple[float, float] | None  # None: a single seed


@dataclass(frozen=True, slots=True)
class PairedGains:
    """The gains of one policy at one point of a sweep."""

    point: tuple[str, ...]  # values of the axes
    policy: str
    against: str
    seeds: int
    mean: Gain
    p99: Gain


def paired_gains(rows: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[PairedGains]:
    """The gains of every policy over one of `AGAINST`, in the order of the rows; from seeds in which both completed tasks."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    if len(policies) < 2:
        return []
    against = next((policy for policy in AGAINST if policy in policies), policies[0])
    points: dict[tuple[str, ...], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for row in rows:
        if all(row[measure] not in ("", None) for measure in _MEASURES):
            here = points.setdefault(tuple(str(row[name]) for name in axes), {})
            here.setdefault(row["policy"], {})[int(row["seed"])] = row
    found = []
    for point, runs in points.items():
        for policy in policies:
            seeds = sorted(runs.get(policy, {}).keys() & runs.get(against, {}).keys())
            if policy == against or not seeds:
                continue
            mean, p99 = (
                _gain([runs[policy][s][name] for s in seeds], [runs[against][s][name] for s in seeds])
                for name in _MEASURES
            )
            found.append(PairedGains(point, policy, against, len(seeds), mean, p99))
    return found


def _gain(mine: Iterable[float], others: Iterable[float]) -> Gain:
    pairs = np.array([list(mine), list(others)], dtype=float)
    count = pairs.shape[1]
    share = float(1.0 - pairs[0].mean() / pairs[1].mean())
    if count < 2:
        return Gain(share, None)
    drawn = pairs[:, np.random.default_rng(0).integers(0, count, size=(RESAMPLES, count))].mean(axis=2)
    low, high = np.percentile(1.0 - drawn[0] / drawn[1], (2.5, 97.5))
    return Gain(share, (float(low), float(high)))
