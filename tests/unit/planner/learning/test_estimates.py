"""Estimates of `y = a x + b n`: right after a handful of observations, unmoved by outliers, quick after a change."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from planner.learning.estimates import (
    WINDOW,
    Line,
    Point,
    Prior,
    deviation,
    differences,
    fit,
    kept,
    rounded,
    scatter,
    shrunk,
    steady,
)
from planner.learning.learner import node_points, path_points
from planner.learning.values import NO_PATH, NODE_PRIOR

Observed = tuple[float, int, float]  # time by the profile, samples, busy time

LENET_S = 0.00047  # profile time of a sample
ALEXNET_S = 0.035


def tasks(
    factor: float, overhead_s: float, count: int, rng: random.Random, noise: float = 0.05, sample_s: float = LENET_S
) -> list[Observed]:
    """Observed tasks with 1, 10 or 100 samples, of a part or the whole of a model."""
    found = []
    for _ in range(count):
        samples = rng.choice((1, 10, 100))
        profile_s = samples * sample_s * rng.choice((0.3, 0.6, 1.0))
        found.append((profile_s, samples, (factor * profile_s + overhead_s * samples) * rng.lognormvariate(0, noise)))
    return found


def alike(busy_s: float, count: int, rng: random.Random, noise: float = 0.05) -> list[Observed]:
    """Observed tasks of one kind: 10 samples of a whole LeNet."""
    return [(10 * LENET_S, 10, busy_s * rng.lognormvariate(0, noise)) for _ in range(count)]


def predicted(line: Line, profile_s: float, samples: int) -> float:
    return line.at(Point(profile_s, samples, 0.0, 0.0))


class Learner:
    """An estimate that follows a series of observations as the planner does."""

    def __init__(self, prior: Prior = NODE_PRIOR) -> None:
        self.prior, self.line = prior, prior.line
        self.window: list[Observed] = []
        self.changes = 0

    def see(self, observed: Sequence[Observed]) -> Learner:
        for one in observed:
            window = [*self.window, one][-WINDOW:]
            self.window = window[-kept(node_points(window), self.prior, self.line) :]
            points = node_points(self.window)
            line = steady(fit(points, self.prior), self.line, points)
            self.changes += line != self.line
            self.line = line
        return self

    def predicts(self) -> float:
        return predicted(self.line, 10 * LENET_S, 10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("factor", "overhead_s", "sample_s"),
    [(1.0, 0.0, LENET_S), (3.0, 0.0, ALEXNET_S), (2.0, 0.002, LENET_S), (0.4, 0.01, ALEXNET_S), (1.5, 0.02, ALEXNET_S)],
)
def test_factor_and_overhead_are_recovered_from_noise(
    factor: float, overhead_s: float, sample_s: float, seed: int
) -> None:
    line = fit(node_points(tasks(factor, overhead_s, WINDOW, random.Random(seed), sample_s=sample_s)), NODE_PRIOR)
    for share in (0.3, 0.6, 1.0):  # what a node computes of a sample
        profile_s = share * sample_s
        truth_s = factor * profile_s + overhead_s
        assert predicted(line, profile_s, 1) == pytest.approx(truth_s, rel=0.12)


def test_without_observations_the_prior_holds() -> None:
    assert fit([], NODE_PRIOR) == Line(1.0, 0.0)
    assert fit([], NO_PATH) == Line(0.0, 0.0)


@pytest.mark.parametrize("times", [0.2, 1.0, 5.0, 50.0])
def test_one_observation_moves_the_prediction_for_the_same_task_nearly_all_the_way(times: float) -> None:
    profile_s = 10 * LENET_S
    line = fit(node_points([(profile_s, 10, times * profile_s)]), NODE_PRIOR)
    assert predicted(line, profile_s, 10) == pytest.approx(times * profile_s, rel=0.05)


@pytest.mark.parametrize("gap_s", [0.003, 0.03, 3.0])
def test_one_observation_moves_the_overheads_of_a_path_nearly_all_the_way(gap_s: float) -> None:
    points = path_points([(10, gap_s + 0.01, gap_s, 0.0)])
    assert fit(points, NO_PATH).at(points[0]) == pytest.approx(gap_s, rel=0.05)


def test_one_observation_leaves_most_of_the_prior_for_another_kind_of_task() -> None:
    """Ten times the samples: an overhead that was seen once may belong to the task or to each sample."""
    line = fit(path_points([(10, 0.03, 0.02, 0.0)]), NO_PATH)
    assert 0.02 < line.a + 100 * line.b < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_ten_tasks_of_one_kind_predict_the_next_within_a_few_percent(seed: int) -> None:
    learner = Learner().see(alike(0.03, 10, random.Random(seed)))
    assert learner.predicts() == pytest.approx(0.03, rel=0.05)


@pytest.mark.parametrize("outlier", [0.05, 10.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_outliers_do_not_move_an_estimate(outlier: float, seed: int) -> None:
    rng = random.Random(seed)
    learner = Learner().see(alike(0.03, 8, rng))
    before = learner.predicts()
    for _ in range(2):
        learner.see([(10 * LENET_S, 10, outlier * 0.03)])
        learner.see(alike(0.03, 3, rng))
        assert learner.predicts() == pytest.approx(before, rel=0.06)


def test_a_first_task_that_is_slow_is_outvoted_by_the_second() -> None:
    learner = Learner().see(alike(0.1, 1, random.Random(1)))
    assert learner.predicts() > 0.09
    assert learner.see(alike(0.03, 2, random.Random(1))).predicts() == pytest.approx(0.03, rel=0.15)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("times", [3.0, 1 / 3])
def test_a_jump_is_followed_within_five_observations_and_back_again(times: float, seed: int) -> None:
    rng = random.Random(seed)
    learner = Learner().see(alike(0.03, WINDOW, rng, noise=0.1))
    learner.see(alike(times * 0.03, 5, rng, noise=0.1))
    assert learner.predicts() == pytest.approx(times * 0.03, rel=0.15)
    learner.see(alike(0.03, 5, rng, noise=0.1))
    assert learner.predicts() == pytest.approx(0.03, rel=0.15)


def test_an_observation_of_a_stale_estimate_alone_shows_that_the_world_has_changed() -> None:
    slow = [Point(1.0, 10, 3.0, 3.0)] * 4
    used = fit(slow, NODE_PRIOR)
    again = [*slow, Point(1.0, 10, 1.0, 1.0)]
    assert kept(again, NODE_PRIOR, used) == 5, "one task that is fast may be an outlier"
    assert kept(again, NODE_PRIOR, used, retried=True) == 1
    assert kept([*slow, slow[0]], NODE_PRIOR, used, retried=True) == 5


def test_a_chance_agreement_of_older_observations_does_not_make_noise_a_change() -> None:
    equal = [Point(1.0, 10, 1.0, 1.0)] * 4
    points = [*equal, *[Point(1.0, 10, 2.0, 1.0)] * 2]
    used = fit(equal, NODE_PRIOR)
    assert kept(points, NODE_PRIOR, used) == 2
    assert kept(points, NODE_PRIOR, used, scatter=0.5) == 6


def noisy(sigma: float, count: int, rng: random.Random, factor: float = 1.0) -> list[Point]:
    """Tasks of 1 s by the profile whose times are log-normal with the mean `factor`."""
    return [Point(1.0, 10, factor * rng.lognormvariate(-sigma * sigma / 2, sigma), 1.0) for _ in range(count)]


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_scatter_is_that_of_the_times_also_with_a_change_among_them(sigma: float, seed: int) -> None:
    rng = random.Random(seed)
    times = [(point.y, 1.0) for point in noisy(sigma, 50, rng) + noisy(sigma, 50, rng, factor=5.0)]
    assert scatter(differences(times)) == pytest.approx(sigma, rel=0.35)


def test_few_or_equal_times_show_no_scatter() -> None:
    assert scatter(differences([(1.0, 1.0), (9.0, 1.0), (0.1, 1.0)])) == 0.0
    assert scatter(differences([(2.0, 1.0)] * 9)) == 0.0
    assert scatter(differences([(0.0, 1.0), (1.0, 0.0)])) == 0.0
    assert scatter([100.0] * 9) <= 1.5


def test_one_observation_among_scattered_times_is_not_believed_and_without_scatter_it_is() -> None:
    points = [Point(1.0, 10, 4.0, 4.0)]
    found = fit(points, NODE_PRIOR)
    assert shrunk(found, NODE_PRIOR, points, 0.0) == found
    assert shrunk(found, NODE_PRIOR, points, 1.0) == NODE_PRIOR.line
    assert shrunk(found, NODE_PRIOR, points, 0.05).at(points[0]) == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("seed", range(10))
def test_what_stands_out_of_the_scatter_is_believed(seed: int) -> None:
    points = noisy(0.3, 8, random.Random(seed), factor=4.0)
    assert shrunk(fit(points, NODE_PRIOR), NODE_PRIOR, points, 0.3).at(points[0]) == pytest.approx(4.0, rel=0.35)


@pytest.mark.parametrize("count", [1, 3, 16])
def test_noise_alone_hardly_moves_an_estimate_from_a_prior_that_is_right(count: int) -> None:
    def error(believed: bool, seed: int) -> float:
        points = noisy(1.0, count, random.Random(seed))
        found = fit(points, NODE_PRIOR)
        return abs(math.log((shrunk(found, NODE_PRIOR, points, 1.0) if believed else found).at(points[0])))

    seeds = range(50)
    assert sum(error(True, seed) for seed in seeds) < 0.15 * sum(error(False, seed) for seed in seeds)


def test_a_slow_drift_is_followed() -> None:
    rng = random.Random(3)
    learner = Learner()
    for step in range(60):
        learner.see(alike(0.03 * 1.02**step, 1, rng))
    assert learner.predicts() == pytest.approx(0.03 * 1.02**60, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_rarely_forgets_and_rarely_changes_the_values(seed: int) -> None:
    rng = random.Random(seed)
    learner = Learner().see(alike(0.03, 10, rng))
    before = learner.changes
    learner.see(alike(0.03, 50, rng))
    assert learner.changes - before <= 6
    assert len(learner.window) == WINDOW


@pytest.mark.parametrize("seed", range(30))
def test_estimates_are_finite_bounded_and_repeatable(seed: int) -> None:
    rng = random.Random(seed)
    for prior in (NODE_PRIOR, NO_PATH):
        points = []
        for _ in range(rng.randrange(1, WINDOW)):
            size = 10.0 ** rng.uniform(-9, 9)
            x = rng.choice((0.0, 1.0, size))
            points.append(
                Point(x, rng.choice((1, 10_000_000)), rng.choice((0.0, size, -size)), rng.choice((0.0, size)))
            )
        line = fit(points, prior)
        assert math.isfinite(line.a)
        assert math.isfinite(line.b)
        assert prior.least.a <= line.a <= prior.most.a
        assert prior.least.b <= line.b <= prior.most.b
        assert fit(points, prior) == line
        assert 1 <= kept(points, prior, line) <= len(points)


def test_values_in_use_stay_while_they_predict_the_same() -> None:
    points = node_points([(0.1, 1, 0.1)])
    assert steady(Line(1.02, 0.0), Line(1.0, 0.0), points) == Line(1.0, 0.0)
    assert steady(Line(1.2, 0.0), Line(1.0, 0.0), points) == Line(rounded(1.2), 0.0)


def test_rounded_values_are_few_and_near() -> None:
    assert rounded(1.0) == 1.0
    assert rounded(1e-6) == rounded(0.0) == 0.0
    assert len({rounded(1.0 + i / 1000) for i in range(1000)}) < 30
    for value in (0.3, 1.234, 56.7, -0.5):
        assert rounded(value) == pytest.approx(value, rel=0.02)
        assert rounded(rounded(value)) == rounded(value)


def test_the_deviation_is_robust_and_bounded() -> None:
    assert deviation([]) == 0.0
    assert deviation([19.0]) == 1.0
    assert deviation([19.0, 0.1, -0.1, 0.1]) == pytest.approx(0.15)
