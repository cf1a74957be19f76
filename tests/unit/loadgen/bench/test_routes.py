"""`deepar loadgen bench routes` with small models instead of large ones."""

import numpy as np
import pytest

from bus.errors import InvariantError
from loadgen.bench import routes
from planner.search.route_search import Mix


def test_the_rows_have_times_and_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "AIMS_S", {4: 10.0, 5: 1e-9})
    monkeypatch.setattr(routes, "MODELS", 2)
    monkeypatch.setattr(routes, "SEARCHES", 4)
    report = routes.run()
    assert [(row["layers"], row["pairs"]) for row in report["results"]] == [(4, 15), (5, 21)]
    for row in report["results"]:
        assert 0 < row["solve_p50_s"] <= row["solve_p99_s"]
        assert row["highs_p50_s"] > 0
        assert row["ratio"] > 0
        assert 0 <= row["gap"] <= 1e-9
    assert [aim["pass"] for aim in report["aims"]] == [True, False, True]
    assert [aim["aim"] for aim in report["aims"]] == [10.0, 1e-9, 1e-9]


def _gap(objective_s: float, price: float) -> float:
    """The gap of two routes of 1 s at stations of their own, 11 samples each; the optimum is 1 s + 10 * 0.5 s."""
    stations_s = np.zeros((2, 7))
    stations_s[0, 0] = stations_s[1, 1] = 1.0
    mix = Mix(0.0, objective_s, (), 0.0, (price, 10.0 - price, 0.0, 0.0, 0.0, 0.0, 0.0), 0.0)
    return routes.relative_gap(mix, routes.Routes(np.ones(2), stations_s, 11))


def test_the_gap_is_the_distance_from_the_bound_that_the_prices_prove() -> None:
    assert _gap(6.0, 5.0) == 0.0
    assert _gap(8.0, 5.0) == 0.25  # worse shares
    assert _gap(6.0, 4.0) == pytest.approx(1 / 6)  # worse prices prove less
    with pytest.raises(InvariantError, match="prices"):
        _gap(6.0, -1.0)
