"""Histograms of ended tasks: each task is counted once, with its outcome, its kind, and how well it was predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count
from statistics import median

import pytest

from bus.messages import Decision, Ended, TaskState
from planner.core.core import PlannerCore
from planner.service.prediction_errors import PredictionErrors
from planner.service.task_statistics import NOT_PLACED, Histogram, TaskStatistics
from tests.unit.planner.scenes import RandomRegion, Traffic


def told(log: list[Decision], *, folded: int = 0) -> TaskStatistics:
    statistics = TaskStatistics()
    for number, decision in enumerate(log):
        (statistics.fold if number < folded else statistics.record)(decision)
    return statistics


def counted(statistics: TaskStatistics) -> Counter[str]:
    found: Counter[str] = Counter()
    for (outcome, _), histogram in statistics.delays.items():
        found[outcome] += sum(histogram.counts)
    return found


@pytest.mark.parametrize("folded", [0, 40])
def test_every_end_is_counted_once_with_its_outcome(folded: int) -> None:
    world = RandomRegion(PlannerCore(0), 5, Traffic(rate=4.0), validate=False).run()
    ends = Counter(
        change.state.value.lower()
        for decision in world.log[folded:]
        for change in decision.changes
        if isinstance(change, Ended)
    )
    statistics = told(world.log, folded=folded)
    assert counted(statistics) == ends
    assert len(ends) > 1
    completed = {kind for outcome, kind in statistics.delays if outcome == "completed"}
    assert NOT_PLACED not in completed
    ratios = sum(sum(histogram.counts) for histogram in statistics.ratios.values())
    assert ratios == ends[TaskState.COMPLETED.value.lower()]


def test_the_sums_are_those_of_the_records() -> None:
    world = RandomRegion(PlannerCore(0), 6, Traffic(rate=2.0), validate=False).run()
    statistics = told(world.log)
    ratio_sum = sum(
        end.delay_s / world.placed[task_id].delay_s
        for task_id, end in world.ended.items()
        if end.state is TaskState.COMPLETED and end.delay_s is not None
    )
    assert sum(histogram.total for histogram in statistics.ratios.values()) == pytest.approx(ratio_sum)


def test_a_value_on_a_bound_belongs_to_it_and_one_above_all_to_the_last() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1, 100.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.total == pytest.approx(106.6)


def test_what_is_kept_is_what_lives() -> None:
    world = RandomRegion(PlannerCore(0), 7, Traffic(rate=4.0), validate=False).run()
    statistics = told(world.log[:50], folded=50)
    statistics.retain({})
    for decision in world.log[50:]:
        statistics.record(decision)
    admitted = {change.task.task_id for d in world.log[50:] for change in d.changes if change.type == "admitted"}
    ended = {change.task_id for d in world.log[50:] for change in d.changes if isinstance(change, Ended)}
    assert sum(counted(statistics).values()) == len(admitted & ended)


def late(decision: Decision, factors: Iterator[float]) -> Decision:
    """The decision, with each measured delay multiplied by the next factor."""
    changes = tuple(
        change.model_copy(update={"delay_s": change.delay_s * next(factors)})
        if isinstance(change, Ended) and change.delay_s is not None
        else change
        for change in decision.changes
    )
    return decision.model_copy(update={"changes": changes})


def test_the_error_is_the_median_of_the_last_fifty_completed_tasks() -> None:
    world = RandomRegion(PlannerCore(0), 8, Traffic(rate=4.0), validate=False).run()
    log = [late(decision, factors) for factors in [count(1.0, 0.01)] for decision in world.log]
    ratios = [
        change.delay_s / world.placed[change.task_id].delay_s
        for decision in log
        for change in decision.changes
        if isinstance(change, Ended) and change.state is TaskState.COMPLETED and change.delay_s is not None
    ]
    assert len(ratios) > 50, "the first ones are forgotten"
    errors = told(log).errors
    assert len(errors) == 50
    assert errors.median == pytest.approx(median(abs(ratio - 1.0) for ratio in ratios[-50:]))
    assert told(log, folded=len(log)).errors.median is None, "replayed tasks do not count"


def test_a_prediction_that_is_twice_too_long_is_as_wrong_as_the_measured_time_says() -> None:
    errors = PredictionErrors()
    assert not len(errors)
    for measured_s, predicted_s in ((1.0, 2.0), (3.0, 2.0), (2.2, 2.0), (5.0, 0.0)):
        errors.observe(measured_s, predicted_s)
    assert len(errors) == 3
    assert errors.median == pytest.approx(0.5)
