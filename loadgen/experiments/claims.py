"""Claims and verdicts: the paper's statements and this project's own claims, compared with measured values.

A statement of the paper agrees, exceeds or misses:

* "about X %" agrees within 5 points of X, on the mean over the x axis; a larger reduction exceeds, a smaller one misses.
* "up to X %" is judged at the best x: it misses below X, and exceeds more than 5 points above X.
* "over X %" is strict, and has no upper side.
* a range agrees inside, exceeds above and misses below.

An own claim holds only if its 95 % confidence interval over the seeds lies above zero; otherwise it is "not shown".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from loadgen.replay.metrics import half_width_95

ABOUT_POINTS = 5.0
"""Tolerance of "about" in percentage points, in both directions."""


class Verdict(StrEnum):
    """Verdict of a claim. The first three are for the paper's statements, the last two for our own claims."""

    AGREES = "agrees"
    EXCEEDS = "exceeds"  # a larger reduction than the paper's
    MISSES = "misses"
    HOLDS = "holds"
    NOT_SHOWN = "not shown"


OWN = (Verdict.HOLDS, Verdict.NOT_SHOWN)
"""Verdicts of claims that the paper does not make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One statement with its verdict. Values are numbers in `unit`, or words."""

    text: str  # the statement
    case: str = ""  # part of the figure, e.g. "E_i = 2"; empty if there is only one
    paper: float | str | None = None  # the paper's value; None for a claim of our own
    ours: float | str  # our value
    verdict: Verdict
    fitted: bool = False  # the profile was fitted to this statement
    spread: float | None = None  # standard deviation over the seeds; None if nothing is random
    ci95: tuple[float, float] | None = None  # 95 % confidence interval over the seeds, of our own claims
    unit: str = ""  # unit of the numbers
    rule: str = ""  # the paper's wording: about, over, up to
    remark: str = ""  # additional information

    @property
    def own(self) -> bool:
        """Whether the claim is ours and not the paper's."""
        return self.verdict in OWN

    @property
    def passed(self) -> bool:
        """False only for `misses` and `not shown`."""
        return self.verdict not in (Verdict.MISSES, Verdict.NOT_SHOWN)

    def as_row(self) -> dict[str, Any]:
        """The form that `--json` prints."""
        return {
            "text": f"{self.text}, {self.case}" if self.case else self.text,
            "case": self.case,
            "source": "ours" if self.own else "paper",
            "paper": self.paper,
            "ours": self.ours,
            "spread": self.spread,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "pass": self.passed,
            "verdict": self.verdict.value,
            "fitted": self.fitted,
            "unit": self.unit,
            "rule": self.rule,
            "remark": self.remark,
        }

    @property
    def verdict_text(self) -> str:
        """The verdict in capitals, followed by "fitted" if the profile was fitted to the statement."""
        return self.verdict.value.upper() + (", fitted" if self.fitted else "")

    @property
    def paper_text(self) -> str:
        """The paper's value as text."""
        return "" if self.paper is None else f"{self.rule} {_words(self.paper, self.unit)}".strip()

    @property
    def value_text(self) -> str:
        """Our value as text, without the remark."""
        prefix = "up to " if self.rule == "up to" else ""
        return f"{prefix}{_words(self.ours, self.unit)}"

    @property
    def ours_text(self) -> str:
        """Our value and the remark as text."""
        return self.value_text + (f" ({self.remark})" if self.remark else "")

    @property
    def spread_text(self) -> str:
        """The spread as text."""
        return "" if self.spread is None else f"sd {self.spread:.1f} {_points(self.unit)}"

    @property
    def ci95_text(self) -> str:
        """The confidence interval as text."""
        if self.ci95 is None:
            return "needs two seeds"
        digits = 1 if max(map(abs, self.ci95)) >= 10 else 2
        low, high = (f"{value:.{digits}f}" for value in self.ci95)
        return f"{low} to {high} {self.unit}"

    def line(self) -> str:
        """One line with everything, for messages."""
        paper = "" if self.own else f"paper {self.paper_text}, "
        beyond = (
            f", 95 % interval {self.ci95_text}" if self.own else f", {self.spread_text}" if self.spread_text else ""
        )
        case = f", {self.case}" if self.case else ""
        return f"{self.verdict_text}  {self.text}{case}: {paper}ours {self.ours_text}{beyond}"


def as_fitted(claims: Iterable[Claim], fitted: bool) -> list[Claim]:
    """The same claims; those of the paper are marked if the profile was fitted to them."""
    return [dataclasses.replace(claim, fitted=fitted and not claim.own) for claim in claims]


def _points(unit: str) -> str:
    return "points" if unit == "%" else unit


def _words(value: float | str, unit: str) -> str:
    if isinstance(value, str):
        return value
    number = f"{value:.1f}".removesuffix(".0") if unit == "%" else f"{value:.4g}"
    return f"{number} {unit}".rstrip()


@dataclass(frozen=True, slots=True)
class Reductions:
    """Reduction of the delay below a baseline in percent: one row per seed, one column per x."""

    values: np.ndarray  # shape (seeds, x)
    pooled: np.ndarray  # shape (x,): reduction of the mean over the seeds

    @classmethod
    def of(cls, policy: np.ndarray, baseline: np.ndarray) -> Reductions:
        """From mean delays of shape (seeds, x)."""
        return cls(100 * (1 - policy / baseline), 100 * (1 - policy.mean(axis=0) / baseline.mean(axis=0)))

    @property
    def mean(self) -> float:
        """Mean over the x axis of the means over the seeds."""
        return float(self.pooled.mean())

    @property
    def best(self) -> float:
        """Reduction at the best x."""
        return float(self.pooled.max())

    @property
    def by_seed(self) -> list[float]:
        """The mean over x of each seed."""
        return [float(value) for value in self.values.mean(axis=1)]

    @property
    def spread(self) -> float | None:
        """Standard deviation of `by_seed`; None for one seed."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.values) > 1 else None


Rule = Callable[[str, Reductions, float], Claim]


def about(text: str, found: Reductions, percent: float) -> Claim:
    """Within 5 points of `percent`, on the mean over the x axis."""
    verdict = _between(found.mean, percent - ABOUT_POINTS, percent + ABOUT_POINTS)
    return _claim(text, "about", found, percent, found.mean, verdict)


def over(text: str, found: Reductions, percent: float) -> Claim:
    """More than `percent`, on the mean over the x axis."""
    verdict = Verdict.AGREES if found.mean > percent else Verdict.MISSES
    return _claim(text, "over", found, percent, found.mean, verdict)


def up_to(text: str, found: Reductions, percent: float) -> Claim:
    """At least `percent` at the best x, and at most 5 points more."""
    verdict = _between(found.best, percent, percent + ABOUT_POINTS)
    return _claim(text, "up to", found, percent, found.best, verdict)


def _claim(text: str, rule: str, found: Reductions, percent: float, ours: float, verdict: Verdict) -> Claim:
    return Claim(text=text, paper=percent, ours=ours, spread=found.spread, verdict=verdict, unit="%", rule=rule)


_ROUNDING = 1e-9
"""Rounding tolerance of a reduction, in percent."""


def _between(value: float, low: float, high: float) -> Verdict:
    if math.isnan(value) or value < low - _ROUNDING:
        return Verdict.MISSES
    return Verdict.EXCEEDS if value > high + _ROUNDING else Verdict.AGREES


def between(text: str, low: float, high: float, ours: float) -> Claim:
    """A reduction in percent inside a range that the paper gives."""
    return Claim(text=text, paper=f"{low:g}-{high:g} %", ours=ours, unit="%", verdict=_between(ours, low, high))


def near(text: str, paper: float, ours: float, *, unit: str, tolerance: float) -> Claim:
    """A number within a relative tolerance in both directions, without randomness."""
    agrees = abs(ours - paper) <= tolerance * abs(paper)
    return Claim(text=text, paper=paper, ours=ours, unit=unit, verdict=Verdict.AGREES if agrees else Verdict.MISSES)


def is_true(text: str, paper: str, ours: str, agrees: bool) -> Claim:
    """A statement without a number."""
    return Claim(text=text, paper=paper, ours=ours, verdict=Verdict.AGREES if agrees else Verdict.MISSES)


def pays(text: str, found: Reductions, remark: str = "") -> Claim:
    """A claim of our own: the reduction is greater than zero with 95 % confidence over the seeds."""
    mean = float(np.mean(found.by_seed))
    half = half_width_95(found.by_seed)
    ci95 = None if half is None else (mean - half, mean + half)
    holds = ci95 is not None and ci95[0] > _ROUNDING
    return Claim(
        text=text, ours=mean, spread=found.spread, ci95=ci95, unit="%", remark=remark,
        verdict=Verdict.HOLDS if holds else Verdict.NOT_SHOWN,
    )  # fmt: skip
