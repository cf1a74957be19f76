"""The order of routes keeps their shares, and its delay is what the stations take."""

import random

import pytest

from bus.routes.interleave import LEAST_WINDOW, RouteOrder, device_only, interleaved_s
from bus.routes.shares import solve_shares
from bus.values import StationSeconds


def _random_shares(rng: random.Random, count: int) -> list[float]:
    weights = [rng.random() for _ in range(count)]
    return [weight / sum(weights) for weight in weights]


def _random_stations(rng: random.Random) -> StationSeconds:
    """A cut in the model: the input or an activation crosses both links, or only the first one."""
    s1, s2, s3, s4, s5, s6, s7 = (rng.random() for _ in range(7))
    if rng.random() < 0.3:
        s4 = s5 = s6 = 0.0
    return (0.0 if rng.random() < 0.3 else s1), s2, (0.0 if rng.random() < 0.3 else s3), s4, s5, s6, s7


@pytest.mark.parametrize("seed", range(30))
def test_each_sample_takes_the_route_that_is_furthest_behind(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(1, 6)
    shares = _random_shares(rng, count)
    order, taken = RouteOrder(shares), [0] * count
    for sample in range(1, 400):
        behind = [sample * share - n for share, n in zip(shares, taken, strict=True)]
        route = order.next(range(count))
        assert behind[route] == max(behind)
        taken[route] += 1
        assert all(n < sample * share + 1 for share, n in zip(shares, taken, strict=True))


def test_the_first_of_equal_routes_goes_first() -> None:
    order = RouteOrder([0.25, 0.25, 0.5])
    assert [order.next((0, 1, 2)) for _ in range(8)] == [2, 0, 1, 2, 2, 0, 1, 2]


def test_a_route_without_a_share_is_taken_only_where_no_other_is_allowed() -> None:
    order = RouteOrder([0.75, 0.0, 0.25])
    order.next((0, 1, 2))
    order.change([0.0, 0.5, 0.5])  # route 0 is 0.25 ahead, the others behind
    assert [order.next((0, 1)) for _ in range(3)] == [1, 1, 1]
    assert order.next((0,)) == 0
    with pytest.raises(ValueError, match="empty"):
        order.next(())


def test_equal_shares_that_are_set_again_change_nothing() -> None:
    """A route with a small share gets its samples though the shares are set anew more often than it gets one."""
    shares = [0.98, 0.02]
    order, again = RouteOrder(shares), RouteOrder(shares)
    taken = [0, 0]
    for sample in range(1_000):
        if sample % 25 == 0:
            again.change(shares)
        route = order.next((0, 1))
        assert again.next((0, 1)) == route, f"sample {sample}"
        taken[route] += 1
    assert taken == [980, 20]


def test_a_route_that_could_not_keep_up_does_not_catch_up() -> None:
    order = RouteOrder([0.5, 0.5])
    assert [order.next((1,)) for _ in range(100)] == [1] * 100
    order.change([0.1, 0.9])
    taken = [order.next((0, 1)) for _ in range(100)]
    assert 10 <= taken.count(0) <= 13


# --- the delay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 40, 200])
def test_one_route_takes_the_pipelined_delay(samples: int) -> None:
    stations = (0.25, 0.5, 0.125, 0.5, 0.0, 0.25, 0.25)
    assert interleaved_s([2.0], [stations], [1.0], samples) == 2.0 + (samples - 1) * 0.5
    alone = (0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert interleaved_s([0.75], [alone], [1.0], samples) == 0.75 + (samples - 1) * 0.5


def _station_by_station_s(fill: list[float], routes: list[StationSeconds], taken: list[int]) -> float:
    """Another way to compute the delay where all samples fit into the window: one station after the other."""
    ready = [0.0] * len(taken)
    for k in range(7):
        free = 0.0
        for i in sorted(range(len(taken)), key=lambda i: (ready[i], i)):
            if (time := routes[taken[i]][k]) or k < 2:
                ready[i] = free = max(free, ready[i]) + time
    return max(end + fill[r] - sum(routes[r]) for end, r in zip(ready, taken, strict=True))


@pytest.mark.parametrize("seed", range(100))
def test_the_delay_is_that_of_stations_which_serve_samples_as_they_arrive(seed: int) -> None:
    rng = random.Random(seed)
    routes = [_random_stations(rng) for _ in range(rng.randrange(1, 5))]
    fill = [sum(times) + rng.random() for times in routes]
    shares, samples = _random_shares(rng, len(routes)), rng.randrange(1, LEAST_WINDOW + 1)
    order = RouteOrder(shares)
    taken = [order.next(range(len(routes))) for _ in range(samples)]
    wanted = _station_by_station_s(fill, routes, taken)
    assert interleaved_s(fill, routes, shares, samples) == pytest.approx(wanted, rel=1e-12)


def test_the_prediction_is_exceeded_by_a_constant_at_most() -> None:
    """The bound of docs/planner.md: (N + 6) P + R sum F_r; so the excess over max F_r + (N - 1) P does not grow with N."""
    longer = 0
    for seed in range(60):
        rng = random.Random(seed)
        routes = [_random_stations(rng) for _ in range(12)]
        fill = [sum(times) for times in routes]
        for samples in (5, 50, 500):
            found = solve_shares(fill, routes, samples)
            used = [r for r, share in enumerate(found.shares) if share]
            delay = interleaved_s(fill, routes, found.shares, samples)
            bound = (samples + 6) * found.slowest_s + len(used) * sum(fill[r] for r in used)
            assert samples * found.slowest_s * 0.7 < delay < bound, f"seed {seed}"
            longer += delay > max(fill[r] for r in used) + (samples - 1) * found.slowest_s
    assert longer > 20, "the prediction alone is no bound"


def test_no_more_samples_are_under_way_than_the_window_holds() -> None:
    """Route 1 needs the edge, then link 2 for a moment, then the cloud; route 0 needs only link 2.

    Without a window all samples of route 0 would queue at link 2 before the first one of route 1, and the cloud would stay
    idle for half of the time.
    """
    fast, slow = (0.0, 0.01, 0.0, 1.0, 0.0, 0.0, 0.0), (0.0, 0.01, 1.0, 0.001, 1.0, 0.0, 0.0)
    samples = 20 * LEAST_WINDOW
    delay = interleaved_s([1.01, 2.011], [fast, slow], [0.5, 0.5], samples)
    assert samples / 2 < delay < samples / 2 + LEAST_WINDOW


def test_samples_of_the_device_alone_fill_its_idle_time() -> None:
    """The device needs 1 s for a whole sample and 0.25 s for a front part, of which the edge takes 0.5 s."""
    alone, front = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), (0.25, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0)
    assert device_only(alone)
    assert not device_only(front)
    found = solve_shares([1.0, 0.75], [alone, front], 25)
    assert found.shares == pytest.approx((0.2, 0.8))
    # 5 samples alone and 20 fronts keep the device busy for 10 s; the edge begins after 0.25 s
    assert interleaved_s([1.0, 0.75], [alone, front], found.shares, 25) == pytest.approx(10.25)


def test_no_sample_begins_on_the_device_alone_that_would_end_after_the_predicted_delay() -> None:
    """A third of 3 samples is one, and a ninth of 26 rounds to three, but these would end after 4 s and 26 s."""
    alone, edge = (9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert interleaved_s([9.0, 1.0], [alone, edge], [1 / 3, 2 / 3], 3) == pytest.approx(3.0)
    assert interleaved_s([9.0, 1.0], [alone, edge], [1 / 9, 8 / 9], 26) == pytest.approx(24.0)
    # 9 of 10 would end on the device after 9.25 s; predicted are 0.2 + 9 * 0.9 = 8.3 s, so 8 of them end after 8.25 s
    small = (0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0)
    device = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert interleaved_s([1.25, 0.2], [device, small], [0.9, 0.1], 10) == pytest.approx(8.25)
