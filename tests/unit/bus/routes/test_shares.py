"""The shares of routes are optimal, proved by the prices, and equal to those of another solver."""

import random
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import linprog

from bus.routes.shares import MAX_PIVOTS, ShareProgram, solve_shares
from bus.values import MAX_ROUTES, StationSeconds

CASES = 1_000


def _stations(*times: float) -> StationSeconds:
    s1, s2, s3, s4, s5, s6, s7 = (*times, *[0.0] * (7 - len(times)))
    return s1, s2, s3, s4, s5, s6, s7


def _random_routes(rng: random.Random) -> tuple[list[float], list[StationSeconds]]:
    """Routes of quarters of a second, so that ties abound, or of times that differ by four orders of magnitude."""
    ties = rng.random() < 0.5

    def time() -> float:
        if rng.random() < 0.2:
            return 0.0
        return rng.randrange(4) / 4 if ties else rng.random() * 10 ** rng.uniform(-4, 0)

    stations = [_stations(*(time() for _ in range(7))) for _ in range(rng.randrange(1, 40))]
    return [sum(times) + (0.0 if ties else rng.random() / 100) for times in stations], stations


def _samples(rng: random.Random) -> int:
    return rng.choice((1, 2, 10, 100, 1_000, 100_000))


def _objective_s(shares: tuple[float, ...], fill: list[float], stations: list[StationSeconds], samples: int) -> float:
    """The objective, straight from its definition."""
    slowest = max(sum(share * times[k] for share, times in zip(shares, stations, strict=True)) for k in range(7))
    return sum(share * one for share, one in zip(shares, fill, strict=True)) + (samples - 1) * slowest


def test_prices_prove_that_no_shares_are_better() -> None:
    """For prices y >= 0 with sum N - 1, no shares have a lower objective than the least fill + y * stations of a route."""
    for seed in range(CASES):
        rng = random.Random(seed)
        (fill, stations), samples = _random_routes(rng), _samples(rng)
        found = solve_shares(fill, stations, samples)
        assert min(found.shares) >= 0
        assert sum(found.shares) == pytest.approx(1.0, abs=1e-12)
        assert sum(share > 0 for share in found.shares) <= MAX_ROUTES
        assert found.objective_s == pytest.approx(_objective_s(found.shares, fill, stations, samples), rel=1e-12)
        assert min(found.prices) >= 0
        assert sum(found.prices) == pytest.approx(samples - 1, rel=1e-12)
        bound = min(
            one + sum(price * time for price, time in zip(found.prices, times, strict=True))
            for one, times in zip(fill, stations, strict=True)
        )
        assert found.objective_s - bound <= 1e-11 * found.objective_s, f"seed {seed}"


@pytest.mark.parametrize("seed", range(40))
def test_equals_another_solver(seed: int) -> None:
    rng = random.Random(seed)
    (fill, stations), samples = _random_routes(rng), _samples(rng)
    count = len(fill)
    other = linprog(
        [*fill, samples - 1],
        A_ub=np.hstack([np.array(stations).T, -np.ones((7, 1))]),
        b_ub=np.zeros(7),
        A_eq=[[1.0] * count + [0.0]],
        b_eq=[1.0],
        method="highs",
    )
    assert solve_shares(fill, stations, samples).objective_s == pytest.approx(other.fun, rel=1e-8, abs=1e-12)


def test_two_routes_that_load_different_stations_halve_the_slowest_station() -> None:
    found = solve_shares([2.0, 2.0], [_stations(2.0), _stations(0.0, 2.0)], 101)
    assert found.shares == pytest.approx((0.5, 0.5))
    assert found.slowest_s == pytest.approx(1.0)
    assert found.objective_s == pytest.approx(2.0 + 100 * 1.0)
    assert found.prices == pytest.approx(_stations(50.0, 50.0))


@pytest.mark.parametrize("samples", [1, 2, 1_000])
def test_one_route_has_the_pipelined_delay(samples: int) -> None:
    times = _stations(0.25, 0.5, 0.125, 0.5, 0.0, 0.25, 0.25)
    found = solve_shares([sum(times)], [times], samples)
    assert found.shares == (1.0,)
    assert found.objective_s == sum(times) + (samples - 1) * 0.5


def test_another_route_never_makes_it_worse() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        (fill, stations), samples = _random_routes(rng), _samples(rng)
        values = [
            solve_shares(fill[:count], stations[:count], samples).objective_s for count in range(1, len(fill) + 1)
        ]
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(values))


def test_routes_that_tie_everywhere_end_soon() -> None:
    """Every entry is 0 or 1, so almost every step ties: the method must not circle."""
    for seed in range(300):
        rng = random.Random(seed)
        stations = [_stations(*(float(rng.randrange(2)) for _ in range(7))) for _ in range(30)]
        program = ShareProgram(0, 0.0, stations[0], 100)
        while True:
            assert program.pivots < MAX_PIVOTS / 4
            station = program.negative_price()
            if station is not None:
                program.release(station)
                continue
            prices = program.prices
            label = min(range(30), key=lambda r: sum(p * s for p, s in zip(prices, stations[r], strict=True)))
            if sum(p * s for p, s in zip(prices, stations[label], strict=True)) >= program.value_s - 1e-9:
                break
            program.enter(label, 0.0, stations[label])
