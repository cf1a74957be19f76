"""The benchmarks of streams and decisions measure something, and report it in the shape that is promised."""

from __future__ import annotations

import pytest

from bus.values import STATIONS
from loadgen.bench import decision, pipeline
from loadgen.bench.pipeline import Load, worst_second_bytes


def test_the_worst_second_slides() -> None:
    assert worst_second_bytes([(0.0, 5), (0.4, 5), (0.9, 5), (1.0, 7), (3.0, 9)]) == 17
    assert worst_second_bytes([(0.0, 5), (1.0, 6)]) == 6


def test_streams_through_each_station_and_a_shaper() -> None:
    sizes = pipeline.Sizes(
        rounds=1,
        loads=(Load(0.004, 4_000, 10, 0.9, sequential=True),),
        lenet_samples=200,
        rates_bps=(10**7,),
        shaped_s=0.2,
    )
    found = pipeline.run("memory", sizes=sizes)
    *streams, lenet, shaped = found["results"]
    assert [row["case"].split()[0] for row in streams] == list(STATIONS)
    for row in streams:
        assert row["streamed_s"] >= 10 * 0.004
        assert row["sequential_s"] > 10 * 0.004
        assert row["throughput"] * row["streamed_s"] == pytest.approx(10)
    assert lenet["samples_per_s"] > 0
    assert lenet["bare_samples_per_s"] is None
    assert all(1.0 <= samples <= 200 for samples in lenet["samples_a_record"])
    assert 0 < shaped["shaped_bps"] <= 1.2 * shaped["granted_bps"]
    assert {"bench", "machine", "results", "aims", "busyness"} <= found.keys()


def test_decisions_are_timed() -> None:
    found = decision.run("memory", sizes=decision.DecisionBenchSizes(tasks=40, dropped=10, rate_per_s=200.0))
    (row,) = found["results"]
    assert row["tasks"] == 30
    assert 0 < row["p50_s"] <= row["p99_s"]
    assert row["rate_per_s"] == 200.0
