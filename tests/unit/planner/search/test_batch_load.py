"""What other tasks do to a platform that computes in batches, in numbers."""

from __future__ import annotations

import random

import pytest

from bus.values import BatchLoad, BatchSpeed, ModelProfile, Objective
from planner.search.batch_load import batch_load, samples_each, share_of_batch, under_load
from planner.search.cost import Costs, PlatformRow, RowTable
from planner.search.cut_search import CutSearch
from planner.search.families import ALL_THREE, DEVICE_CLOUD, DEVICE_EDGE, family_of
from planner.search.what_if import Situation, plans
from stages.runner import MOST_AT_ONCE
from tests.unit.planner.scenes import profile, random_rows, with_batches

HALVES = tuple(BatchSpeed(batch=size, factors=(1.0, 0.5 + 0.5 / size, 1.0 / size)) for size in (2, 4, 8, 16, 32))


def batching(executors: int | None = None) -> ModelProfile:
    """Three layers: one that gains nothing in a batch, one whose time is half fixed, and one whose time is all fixed."""
    return profile(layer_s=(0.010, 0.010, 0.010)).model_copy(update={"batch": HALVES, "executors": executors})


@pytest.mark.parametrize(
    ("tasks", "each", "executors", "batch", "apart"),
    [
        (1, 1, None, 1.0, 1.0),  # alone, one sample at a time
        (1, 4, None, 4.0, 1.0),  # alone, with samples that wait for each other
        (8, 1, None, 8.0, 8.0),
        (3, 4, None, 12.0, 3.0),
        (8, 4, None, 32.0, 8.0),
        (50, 4, None, 32.0, 50.0),
        (8, 4, 2, 16.0, 4.0),
        (1, 4, 2, 2.0, 0.5),  # on both executors
        (1, 4, 16, 1.0, 0.25),  # on four of them, as it has four samples
        (2, 1, 16, 1.0, 1.0),
    ],
)
def test_the_load_of_tasks(tasks: int, each: int, executors: int | None, batch: float, apart: float) -> None:
    assert batch_load(batching(executors), tasks, each) == BatchLoad(tasks=tasks, batch=batch, apart=apart)


@pytest.mark.parametrize(
    ("samples", "widest", "each"),
    [
        (1, 100, 1),
        (3, 100, 1),
        (4, 100, 2),
        (15, 100, 7),
        (16, 100, 8),
        (1000, 100, 8),
        (1000, 1 << 20, 4),
        (4, 1 << 20, 2),
    ],
)
def test_a_task_has_half_its_window_or_of_its_samples_in_a_batch(samples: int, widest: int, each: int) -> None:
    assert samples_each(samples, (50, widest, 4)) == each


def test_no_more_than_a_stage_gives_to_a_batch() -> None:
    assert samples_each(1000, (50, 4)) == MOST_AT_ONCE


def test_times_between_samples_and_shares() -> None:
    one = batching()
    load = batch_load(one, 8, 1)
    assert share_of_batch(one, 8.0).layer_s == pytest.approx((0.010, 0.005625, 0.00125))
    assert under_load(one, load).layer_s == pytest.approx((0.080, 0.045, 0.010))


@pytest.mark.parametrize("seed", range(5))
def test_a_task_is_never_faster_beside_more_tasks_and_never_slower_than_without_batches(seed: int) -> None:
    one = with_batches(profile(layer_s=(0.01, 0.02, 0.03)), random.Random(seed)).model_copy(update={"executors": None})
    for each in (1, 4):
        before = 0.0
        for tasks in range(1, 65):
            whole_s = sum(under_load(one, batch_load(one, tasks, each)).layer_s)
            assert before - 1e-12 <= whole_s <= tasks * sum(one.layer_s) + 1e-12
            before = whole_s


@pytest.mark.parametrize("seed", range(20))
def test_the_search_is_exact_under_load(seed: int) -> None:
    rng = random.Random(seed)
    device, *_ = random_rows(rng, 6, exact=False)
    platforms = [
        with_batches(profile("m", tuple(rng.random() * 0.01 for _ in range(6)), device.cut_bytes), rng) for _ in "ec"
    ]
    edge, cloud = (
        PlatformRow(one, rng.choice((1.0, 1.7)), 0.001, batch_load(one, rng.randrange(1, 40), 4)) for one in platforms
    )
    costs, search, b1, b2 = Costs(device, edge, cloud), CutSearch(device, edge, cloud), 3e7, 1e7
    for family in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE):
        found = search.best(family, b1, b2, 50, Objective.PIPELINED)
        tried = [
            (costs.delay_s(cut1, cut2, b1, b2, 50, Objective.PIPELINED), cut1, cut2)
            for cut2 in range(7)
            for cut1 in range(cut2 + 1)
            if family_of(cut1, cut2, 6) == family and not {cut1, cut2} & device.forbidden
        ]
        assert found is not None
        assert found[0] == pytest.approx(min(tried)[0])


def test_busy_times_are_shares_of_batches() -> None:
    one, load = batching(), batch_load(batching(), 8, 1)
    device = PlatformRow(profile(layer_s=(1.0, 1.0, 1.0)))
    costs = Costs(device, PlatformRow(one, 2.0, 0.001, load), PlatformRow(one, 1.0, 0.0, load))
    sample = costs.sample_parts(0, 2, 1e8, 1e8)
    assert sample.s3 == pytest.approx(2 * (0.080 + 0.045) + 8 * 0.001)
    assert sample.s5 == pytest.approx(0.010)
    parts = costs.parts(0, 2, 1e8, 1e8, 10)
    assert parts.edge_s == pytest.approx(10 * (2 * (0.010 + 0.005625) + 0.001))
    assert parts.cloud_s == pytest.approx(10 * 0.00125)


def test_rows_of_different_loads_differ() -> None:
    table, one = RowTable(), batching()
    light, heavy = (table.row(one, load=batch_load(one, tasks, 4)) for tasks in (1, 2))
    assert light is not heavy
    assert light is table.row(batching(), load=batch_load(one, 1, 4))
    other = one.model_copy(update={"batch": HALVES[:1]})
    assert table.row(other, load=batch_load(one, 1, 4)) is not light
    assert table.row(one) is table.row(other) is table.row(one.without_batches())


def test_a_plan_alone_is_in_batches_of_its_own_samples_where_it_is_pipelined() -> None:
    device = profile(layer_s=(1.0, 1.0, 1.0))

    def best_s(cloud: ModelProfile, objective: Objective, samples: int) -> float:
        situation = Situation(device, None, cloud, 10**9, 10**9, samples, objective)
        return plans(situation)[0].parts.cloud_s / samples

    plain = batching().without_batches()
    assert best_s(batching(), Objective.PIPELINED, 100) == pytest.approx(0.010 + 0.005625 + 0.00125)
    assert best_s(batching(), Objective.PIPELINED, 3) == best_s(plain, Objective.PIPELINED, 3)
    assert best_s(batching(), Objective.SEQUENTIAL, 100) == best_s(plain, Objective.SEQUENTIAL, 100)
