"""Gains of a policy over another one, from pairs of runs on the same tasks."""

from __future__ import annotations

import random
from typing import Any

import pytest

from loadgen.experiments.paired import paired_gains


def rows(seeds: int, gain: float, noise: float, policies: tuple[str, ...] = ("edge-only", "deepar", "routes")) -> Any:
    """Seeds differ much, the pairs of a seed little."""
    rng, found = random.Random(1), []
    for devices in ("20", "40"):
        for seed in range(seeds):
            base = rng.uniform(5.0, 50.0)
            for policy in policies:
                share = 1.0 - gain * (policy == "routes") + rng.gauss(0.0, noise)
                found.append(
                    {
                        "devices": devices, "policy": policy, "seed": seed,
                        "mean_delay_s": base * share, "p99_s": 9 * base * share,
                    }
                )  # fmt: skip
    return found


def test_the_interval_is_about_the_pairs_and_holds_the_gain() -> None:
    found = paired_gains(rows(30, 0.18, 0.02), ["devices"])
    assert [(one.point, one.policy, one.against) for one in found] == [
        (("20",), "edge-only", "deepar"),
        (("20",), "routes", "deepar"),
        (("40",), "edge-only", "deepar"),
        (("40",), "routes", "deepar"),
    ]
    for one in found:
        wanted = 0.18 if one.policy == "routes" else 0.0
        for gain in (one.mean, one.p99):
            assert gain.ci95 is not None
            low, high = gain.ci95
            assert low < gain.share < high
            assert low < wanted < high
            assert high - low < 0.05  # the seeds themselves differ by a factor of ten
    assert found == paired_gains(rows(30, 0.18, 0.02), ["devices"])


def test_only_seeds_with_both_runs_count_and_one_gives_no_interval() -> None:
    some = [row for row in rows(4, 0.5, 0.0) if row["policy"] == "deepar" or row["seed"] == 2]
    found = paired_gains(some, ["devices"])
    assert [(one.seeds, one.mean.ci95) for one in found] == [(1, None)] * 4
    assert found[1].mean.share == pytest.approx(0.5)
    unfinished = [{**row, "p99_s": None} if row["policy"] == "deepar" else row for row in some]
    assert paired_gains(unfinished, ["devices"]) == []


def test_without_deepar_the_first_policy_is_compared_with_and_one_alone_with_none() -> None:
    found = paired_gains(rows(3, 0.2, 0.0, ("routes", "edge-only")), ["devices"])
    assert {(one.policy, one.against) for one in found} == {("edge-only", "routes")}
    assert found[0].mean.share == pytest.approx(-0.25)
    assert paired_gains(rows(3, 0.2, 0.0, ("routes",)), ["devices"]) == []
