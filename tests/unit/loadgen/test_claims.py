"""How a claim passes and misses."""

from __future__ import annotations

import numpy as np
import pytest

from loadgen import claims
from loadgen.claims import Reductions

BASE = np.array([[100.0, 200.0], [100.0, 400.0]])


def found(*percent: float) -> Reductions:
    """Reductions of so many percent at each x, the same in both seeds."""
    return Reductions.of(BASE * (1 - np.array(percent) / 100), BASE)


def test_reductions_over_x_and_over_seeds() -> None:
    both = found(60, 80)
    assert both.mean == pytest.approx(70)
    assert both.best == pytest.approx(80)
    assert both.spread == pytest.approx(0)
    uneven = Reductions.of(np.array([[50.0], [20.0]]), np.array([[100.0], [100.0]]))
    assert uneven.mean == pytest.approx(65)
    assert uneven.spread == pytest.approx(21.2132)


def test_the_mean_delay_counts_not_the_mean_of_ratios() -> None:
    delays = Reductions.of(np.array([[10.0], [100.0]]), np.array([[100.0], [200.0]]))
    assert delays.mean == pytest.approx(100 * (1 - 110 / 300))


@pytest.mark.parametrize(("percent", "passed"), [(15.0, True), (14.9, False), (45.0, True)])
def test_about_reaches_five_points_down(percent: float, passed: bool) -> None:
    assert claims.about("x", found(percent, percent), 20).passed is passed


@pytest.mark.parametrize(("percent", "passed"), [(60.0, False), (60.1, True)])
def test_over_is_strict(percent: float, passed: bool) -> None:
    assert claims.over("x", found(percent, percent), 60).passed is passed


def test_up_to_means_the_best_x() -> None:
    assert claims.up_to("x", found(5, 30.1), 30).passed
    assert not claims.up_to("x", found(29, 29.9), 30).passed
    assert claims.up_to("x", found(5, 31), 30).ours_text == "up to 31 %"


def test_near_is_relative() -> None:
    assert claims.near("x", 314, 316.9, unit="ms", tolerance=0.01).passed
    assert not claims.near("x", 314, 317.2, unit="ms", tolerance=0.01).passed


def test_a_claim_as_text_and_as_a_row() -> None:
    claim = claims.over("below device-only", found(50, 50), 60)
    assert claim.line() == "MISS  below device-only: paper over 60 %, ours 50 %, sd 0.0 points"
    row = claim.as_row()
    assert (row["paper"], row["ours"], row["unit"], row["pass"]) == (60, pytest.approx(50), "%", False)
    words = claims.is_true("cuts after", "a, b", "a, c", False)
    assert words.line() == "MISS  cuts after: paper a, b, ours a, c"
