"""Robust estimates from a few measured times: `y = a x + b n`, with a prior for `a` and `b`.

Two things are learned in this way:

* a node's speed for a model: busy time of a task = factor * time by the profile + overhead * samples; prior 1 and 0.
* a path's overheads: what parts and latencies do not explain of a delay = task overhead + sample overhead * samples; prior 0
  and 0, or what other paths of its kind show.

An estimate uses the last `WINDOW` observations, the latest with the most weight. The fit minimises squared errors; after a
start at the median, observations far from the others lose their weight, so an outlier does not move it. The prior says how to
split a time between `a` and `b` as long as all tasks are alike; it does not hold a prediction back, because overheads are no
noise: one observation moves the prediction for the same kind of task nearly all the way.

Where equal tasks take very different times, a few observations say little. `scatter` says how different, and `shrunk` keeps
of an estimate what stands out of it.

If the last two or three observations all lie clearly on one side of what the older ones predict, the world has changed, and
the older ones are dropped (`kept`). All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median, median_low
from typing import Final, NamedTuple

WINDOW: Final = 16
"""Observations that an estimate uses at most."""

_AGING: Final = 0.9  # weight of an observation, relative to the next one: slow drifts are followed
_NOISE: Final = 0.03  # relative deviation of a time that is measured on a quiet machine
_NOISE_S: Final = 5e-5  # and its deviation in seconds, where times are short
_BORNE: Final = 2.0  # deviations beyond which an observation loses weight
_REJECTED: Final = 6.0  # deviations beyond which it loses all
_MAD: Final = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
_STEPS: Final = 5  # of reweighting; the first two find the median, the others use the deviation around it

_CHANGES: Final = ((2, 0.5, 4.0), (3, 0.2, 2.0))
"""Signs of a change: the number of last observations that are off to one side, and by which share and how many deviations."""

_RETRIED: Final = (1, 0.2, 2.0)
"""The same for an observation of a stale estimate."""

_DIFFERENCE: Final = 0.954  # median absolute difference of two normal values, in their standard deviations
_LEAST_DIFFERENCES: Final = 3  # fewer say nothing about the scatter
_MOST_SCATTER: Final = 1.5  # as a standard deviation of a logarithm
_DOUBTED: Final = 2.0  # standard errors from the prior within which an estimate is not believed

_OLDER: Final = 3
"""Older observations that it takes to see a change; with fewer the fit follows anyway."""

CERTAIN: Final = 0.03
"""Values in use stay as they are while new ones predict the same times within this share: jitter changes no decision."""
_GRID: Final = math.log(1.03)  # values are rounded to powers of 1.03, so that equal nodes get equal values
_LEAST_S: Final = 2e-5  # shorter overheads count as none


class Point(NamedTuple):
    """One observation."""

    x: float  # what `a` is multiplied with
    n: float  # what `b` is multiplied with
    y: float  # measured, in seconds
    time_s: float  # the time to which noise and errors are relative, in seconds, at least 0


class Line(NamedTuple):
    """An estimate."""

    a: float
    b: float

    def at(self, point: Point) -> float:
        """The prediction for the `x` and `n` of a point."""
        return self.a * point.x + self.b * point.n


class Prior(NamedTuple):
    """What is assumed before anything is measured."""

    line: Line
    a_deviation: float  # together they say how to split a time between a and b
    b_deviation: float
    least: Line  # bounds of the estimate
    most: Line


def fit(points: Sequence[Point], prior: Prior) -> Line:
    """The estimate of observations, oldest first; the prior if there are none."""
    if not points:
        return prior.line
    noises = [_NOISE * point.time_s + _NOISE_S for point in points]
    ages = [_AGING ** (len(points) - 1 - i) for i in range(len(points))]
    prior, start = _at_median(points, prior)
    line = _solve([start], [1.0 / (_NOISE * start.time_s + _NOISE_S) ** 2], prior)
    for step in range(_STEPS):
        errors = [abs(point.y - line.at(point)) / noise for point, noise in zip(points, noises, strict=True)]
        if step < 2:
            trust = [1.0 / max(1.0, error) for error in errors]
        else:
            deviation = max(1.0, _MAD * median(errors))
            trust = [_trust(error / deviation) for error in errors]
        weights = [t * age / noise**2 for t, age, noise in zip(trust, ages, noises, strict=True)]
        line, before = _solve(points, weights, prior), line
        if line == before:
            break
    return line


def _trust(error: float) -> float:
    """The share of its weight that an observation keeps, by its error in deviations."""
    if error <= _BORNE:
        return 1.0
    return _BORNE / error if error <= _REJECTED else 0.0


def _at_median(points: Sequence[Point], prior: Prior) -> tuple[Prior, Point]:
    """The prior, widened until the median observation is within it, and that observation."""
    wide_a, wide_b = prior.a_deviation, prior.b_deviation
    far = [(point.y - prior.line.at(point)) / math.hypot(wide_a * point.x, wide_b * point.n) for point in points]
    middle = median_low(far)
    wider = max(1.0, abs(middle))
    widened = prior._replace(a_deviation=wide_a * wider, b_deviation=wide_b * wider)
    return widened, points[len(far) - 1 - far[::-1].index(middle)]


def _solve(points: Sequence[Point], weights: Sequence[float], prior: Prior) -> Line:
    """The least sum of weighted squared errors and of the distance from the prior, within the bounds."""
    (a0, b0), least, most = prior.line, prior.least, prior.most
    aa, bb, ab, ay, by = prior.a_deviation**-2, prior.b_deviation**-2, 0.0, 0.0, 0.0
    for (x, n, y, _), weight in zip(points, weights, strict=True):
        rest = y - a0 * x - b0 * n
        aa += weight * x * x
        bb += weight * n * n
        ab += weight * x * n
        ay += weight * x * rest
        by += weight * n * rest
    determinant = aa * bb - ab * ab
    if determinant > 1e-12 * aa * bb:
        a, b = a0 + (ay * bb - by * ab) / determinant, b0 + (by * aa - ay * ab) / determinant
    else:  # x and n are in one ratio, and the prior is too wide to tell them apart
        a, b = a0 + ay / aa, b0
    if not least.b <= b <= most.b:
        b = min(max(b, least.b), most.b)
        a = a0 + (ay - ab * (b - b0)) / aa
    if not least.a <= a <= most.a:
        a = min(max(a, least.a), most.a)
        b = min(max(b0 + (by - ab * (a - a0)) / bb, least.b), most.b)
    return Line(a, b)


def differences(times: Iterable[tuple[float, float]]) -> list[float]:
    """By how much measured over predicted time differs between successive observations, as logarithms.

    A change of speed shows in one difference only.
    """
    # the ratio with a made-up time may be 0 or infinite; both logarithms are finite
    logs = [
        math.log(measured_s) - math.log(predicted_s)
        for measured_s, predicted_s in times
        if measured_s > 0.0 < predicted_s
    ]
    return [abs(new - old) for old, new in pairwise(logs)]


def scatter(found: Sequence[float]) -> float:
    """The standard deviation of the logarithm of equal tasks' times, from `differences`; 0 while there are few of these."""
    return min(_MOST_SCATTER, median(found) / _DIFFERENCE) if len(found) >= _LEAST_DIFFERENCES else 0.0


def shrunk(found: Line, prior: Prior, points: Sequence[Point], scatter: float) -> Line:
    """The share of an estimate that stands out of the scatter of the times it was made from; the rest is the prior.

    `found` predicts the median of times; the sum of delays depends on their mean, which for log-normal times is
    exp(scatter^2 / 2) as much. The logarithm of that has a distance m from the prior and a standard error e, which falls with
    the number of observations; the share 1 - (2 e / m)^2 is kept, so what lies within two standard errors is not believed.
    """
    assumed_s, found_s = sum(map(prior.line.at, points)), sum(map(found.at, points))
    if scatter <= 0.0 or assumed_s <= 0.0 or found_s <= 0.0:
        return found
    mean = math.exp(scatter * scatter / 2.0)
    distance = math.log(mean * found_s / assumed_s)
    error = scatter / math.sqrt(sum(_AGING**age for age in range(len(points))))
    share = 1.0 - (_DOUBTED * error / distance) ** 2 if distance else 0.0
    if share <= 0.0:
        return prior.line
    (a0, b0), bounds = prior.line, prior.most
    a, b = a0 + share * (mean * found.a - a0), b0 + share * (mean * found.b - b0)
    return Line(min(a, bounds.a), min(b, bounds.b))


def kept(points: Sequence[Point], prior: Prior, used: Line, *, retried: bool = False, scatter: float = 0.0) -> int:
    """How many of the last observations still describe the world; all, unless it has changed. `used`: the estimate before.

    The newest observation is the last point. `retried`: it was made to see whether the older ones still hold, so it alone may
    show that they do not. `scatter`: what equal tasks are known to differ by.
    """
    count = len(points)
    newest = points[-1]
    if abs(_error(newest, used)) < _CHANGES[-1][1]:
        return count
    for last, least, deviations in (_RETRIED, *_CHANGES) if retried else _CHANGES:
        if count < last + (1 if retried else _OLDER):
            continue
        older, recent = points[:-last], points[-last:]
        line = fit(older, prior)
        spread = max(_NOISE, scatter, _MAD * median(abs(_error(point, line)) for point in older))
        limit = max(least, deviations * spread)
        errors = [_error(point, line) for point in recent]
        if min(errors) > limit or max(errors) < -limit:
            return last
    return count


def _error(point: Point, line: Line) -> float:
    return (point.y - line.at(point)) / max(point.time_s, _NOISE_S)


def steady(found: Line, used: Line, points: Sequence[Point]) -> Line:
    """The values to use from now on: the ones in use if both predict the same, otherwise the new ones, rounded."""
    if all(abs(found.at(point) - used.at(point)) <= CERTAIN * point.time_s for point in points):
        return used
    return Line(rounded(found.a), rounded(found.b))


def rounded(value: float) -> float:
    """A value rounded to a power of 1.03 with three digits; 0 for less than `_LEAST_S`."""
    size = abs(value)
    if size < _LEAST_S:
        return 0.0
    return math.copysign(float(f"{math.exp(_GRID * round(math.log(size) / _GRID)):.3g}"), value)


def deviation(errors: Sequence[float]) -> float:
    """The relative deviation of predictions from their errors (measured over predicted, minus 1); at most 1."""
    return min(1.0, float(f"{_MAD * median_low(abs(error) for error in errors):.2g}")) if errors else 0.0
