"""The batch benchmark: it plays tasks through two cloud stages, and judges what they report."""

from __future__ import annotations

import asyncio

import pytest

from loadgen.bench import batches
from stages.zoo.registry import load_model


def test_it_measures_both_stages_with_one_task_and_with_several() -> None:
    found = asyncio.run(batches.measure(load_model("lenet"), "maxpool_2", 0.05, 1, lambda line: None))
    assert [(row["tasks"], row["batches"]) for row in found["results"]] == [
        (1, "off"), (1, "exact"), (batches.TASKS, "off"), (batches.TASKS, "exact"),
    ]  # fmt: skip
    for row in found["results"]:
        assert (row["model"], row["segment"]) == ("lenet", "5..7")
        assert row["samples_per_s"] > 0
        assert row["p50_s"] > 0
    assert len(found["aims"]) == 2


@pytest.mark.parametrize(
    ("per_s", "p50_s", "passed"),
    [(25.0, 0.0103, [True, True]), (24.9, 0.0103, [False, True]), (25.0, 0.0104, [True, False])],
)
def test_the_aims_are_the_gain_under_load_and_the_cost_without(per_s: float, p50_s: float, passed: list[bool]) -> None:
    rows = [
        {"batches": "off", "tasks": 1, "samples_per_s": 100.0, "p50_s": 0.010},
        {"batches": "exact", "tasks": 1, "samples_per_s": 100.0, "p50_s": p50_s},
        {"batches": "off", "tasks": batches.TASKS, "samples_per_s": 10.0, "p50_s": 1.0},
        {"batches": "exact", "tasks": batches.TASKS, "samples_per_s": per_s, "p50_s": 1.0},
    ]
    assert [aim["pass"] for aim in batches.aims(rows)] == passed
