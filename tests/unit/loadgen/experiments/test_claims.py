"""How a claim passes and misses."""

from __future__ import annotations

import numpy as np
import pytest

from loadgen.experiments import claims
from loadgen.experiments.claims import Reductions

BASE = np.array([[100.0, 200.0], [100.0, 400.0]])


def found(*percent: float) -> Reductions:
    """Reductions in percent, one for each x, the same in both seeds."""
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


@pytest.mark.parametrize(
    ("percent", "verdict"),
    [(14.9, "misses"), (15.0, "agrees"), (20.0, "agrees"), (25.0, "agrees"), (25.1, "exceeds"), (39.0, "exceeds")],
)
def test_about_reaches_five_points_to_either_side(percent: float, verdict: str) -> None:
    claim = claims.about("x", found(percent, percent), 20)
    assert claim.verdict == verdict
    assert claim.passed is (verdict != "misses")


@pytest.mark.parametrize(("percent", "verdict"), [(60.0, "misses"), (60.1, "agrees"), (95.0, "agrees")])
def test_over_is_strict_and_has_no_upper_side(percent: float, verdict: str) -> None:
    assert claims.over("x", found(percent, percent), 60).verdict == verdict


@pytest.mark.parametrize(("best", "verdict"), [(29.9, "misses"), (30.1, "agrees"), (35.0, "agrees"), (35.1, "exceeds")])
def test_up_to_means_the_best_x(best: float, verdict: str) -> None:
    assert claims.up_to("x", found(5, best), 30).verdict == verdict
    assert claims.up_to("x", found(5, 31), 30).ours_text == "up to 31 %"


@pytest.mark.parametrize(("ours", "verdict"), [(9.9, "misses"), (10.0, "agrees"), (30.0, "agrees"), (30.5, "exceeds")])
def test_a_range_is_two_sided(ours: float, verdict: str) -> None:
    claim = claims.between("x", 10, 30, ours)
    assert (claim.verdict, claim.paper) == (verdict, "10-30 %")


def test_a_delay_that_cannot_be_computed_misses() -> None:
    assert claims.about("x", found(float("nan"), 20), 20).verdict == "misses"


def test_near_is_relative() -> None:
    assert claims.near("x", 314, 316.9, unit="ms", tolerance=0.01).passed
    assert not claims.near("x", 314, 317.2, unit="ms", tolerance=0.01).passed
    assert not claims.near("x", 314, 100, unit="ms", tolerance=0.01).passed


def by_seed(*percent: float) -> Reductions:
    """Reductions in percent, one for each seed, at one x."""
    return Reductions.of(100 - np.array([[value] for value in percent]), np.full((len(percent), 1), 100.0))


def test_our_own_claim_that_one_seed_carries_is_not_shown() -> None:
    uneven = by_seed(0.12, 4.0, -0.18, 1.7, 0, 14.4, 1.3, 0.1, 0.4, 0)
    claim = claims.pays("waiting pays", uneven)
    assert claim.ours == pytest.approx(2.184)
    assert claim.ci95 == pytest.approx((-1.01, 5.38), abs=0.01)  # Student's t with nine degrees of freedom
    assert (claim.verdict, claim.passed, claim.own, claim.paper) == ("not shown", False, True, None)


def test_our_own_claim_holds_where_the_interval_lies_above_zero() -> None:
    claim = claims.pays("waiting pays", by_seed(1.0, 2.0, 1.5, 2.5))
    assert claim.verdict == "holds"
    assert claim.passed
    assert claim.ci95 is not None
    assert claim.ci95[0] > 0


@pytest.mark.parametrize("percent", [(50.0,), (0.0, 0.0, 0.0), (-3.0, -3.1, -2.9)])
def test_one_seed_no_difference_or_a_loss_show_nothing(percent: tuple[float, ...]) -> None:
    assert claims.pays("x", by_seed(*percent)).verdict == "not shown"


def test_fitted_marks_the_papers_claims_only() -> None:
    paper, own = claims.over("a", found(70, 70), 60), claims.pays("b", found(70, 70))
    assert [claim.fitted for claim in claims.as_fitted([paper, own], True)] == [True, False]
    assert [claim.fitted for claim in claims.as_fitted([paper, own], False)] == [False, False]
    assert claims.as_fitted([paper], True)[0].line().startswith("AGREES, fitted  a: paper over 60 %")


def test_a_claim_as_text_and_as_a_row() -> None:
    claim = claims.over("below device-only", found(50, 50), 60)
    assert claim.line() == "MISSES  below device-only: paper over 60 %, ours 50 %, sd 0.0 points"
    row = claim.as_row()
    assert (row["paper"], row["ours"], row["unit"], row["pass"]) == (60, pytest.approx(50), "%", False)
    assert (row["verdict"], row["fitted"], row["source"]) == ("misses", False, "paper")
    words = claims.is_true("cuts after", "a, b", "a, c", False)
    assert words.line() == "MISSES  cuts after: paper a, b, ours a, c"


def test_a_claim_of_our_own_as_a_row() -> None:
    row = claims.pays("waiting pays", by_seed(1.0, 2.0)).as_row()
    assert (row["source"], row["paper"], row["verdict"]) == ("ours", None, "not shown")
    assert row["ci95"] == pytest.approx([1.5 - 6.353, 1.5 + 6.353], abs=0.01)
