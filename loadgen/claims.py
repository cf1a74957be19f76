"""What the paper claims, what we found, and whether that passes. The rules stand beside the paper's numbers.

"about X %" passes from X - 5 points up, on the mean over the x axis; "up to X %" when the best x reaches X;
"over X %" is strict. More than the paper's reduction passes too, since the aim is to reach it; the report
then shows by how much we differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

ABOUT_POINTS = 5.0
"""How far "about" reaches, in percentage points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One statement of the paper beside ours. Numbers are in `unit`; words where the statement has no number."""

    text: str  # what is claimed
    paper: float | str  # the paper's value
    ours: float | str  # ours
    passed: bool
    spread: float | None = None  # standard deviation over the seeds; None where nothing is drawn
    unit: str = ""  # of the numbers
    rule: str = ""  # about, over, up to: how the paper puts it
    remark: str = ""  # what else to know, for people

    def as_row(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "text": self.text,
            "paper": self.paper,
            "ours": self.ours,
            "spread": self.spread,
            "pass": self.passed,
            "unit": self.unit,
            "rule": self.rule,
            "remark": self.remark,
        }

    @property
    def paper_text(self) -> str:
        """The paper's value as people read it."""
        return f"{self.rule} {_words(self.paper, self.unit)}".strip()

    @property
    def ours_text(self) -> str:
        """Our value as people read it."""
        prefix = "up to " if self.rule == "up to" else ""
        return f"{prefix}{_words(self.ours, self.unit)}" + (f" ({self.remark})" if self.remark else "")

    @property
    def spread_text(self) -> str:
        """The spread as people read it."""
        return "" if self.spread is None else f"sd {self.spread:.1f} {'points' if self.unit == '%' else self.unit}"

    def line(self) -> str:
        """As the plots print it."""
        spread = f", {self.spread_text}" if self.spread is not None else ""
        return (
            f"{'PASS' if self.passed else 'MISS'}  {self.text}: paper {self.paper_text}, ours {self.ours_text}{spread}"
        )


def _words(value: float | str, unit: str) -> str:
    if isinstance(value, str):
        return value
    number = f"{value:.1f}".removesuffix(".0") if unit == "%" else f"{value:.4g}"
    return f"{number} {unit}".rstrip()


@dataclass(frozen=True, slots=True)
class Reductions:
    """By how much `policy` stays below `baseline`, in percent: one row a seed, one column an x."""

    values: np.ndarray  # shape (seeds, x)
    pooled: np.ndarray  # shape (x,): reduction of the mean over the seeds

    @classmethod
    def of(cls, policy: np.ndarray, baseline: np.ndarray) -> Reductions:
        """From mean delays of shape (seeds, x)."""
        return cls(100 * (1 - policy / baseline), 100 * (1 - policy.mean(axis=0) / baseline.mean(axis=0)))

    @property
    def mean(self) -> float:
        """Over the x axis, of the means over the seeds."""
        return float(self.pooled.mean())

    @property
    def best(self) -> float:
        """At the best x."""
        return float(self.pooled.max())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds of the mean over x."""
        return float(self.values.mean(axis=1).std(ddof=1)) if len(self.values) > 1 else 0.0


Rule = Callable[[str, Reductions, float], Claim]


def about(text: str, found: Reductions, percent: float) -> Claim:
    """At least `percent` less 5 points, on the mean over the x axis."""
    return _claim(text, "about", found, percent, found.mean, found.mean >= percent - ABOUT_POINTS)


def over(text: str, found: Reductions, percent: float) -> Claim:
    """More than `percent`, on the mean over the x axis."""
    return _claim(text, "over", found, percent, found.mean, found.mean > percent)


def up_to(text: str, found: Reductions, percent: float) -> Claim:
    """At least `percent` at the best x."""
    return _claim(text, "up to", found, percent, found.best, found.best >= percent)


def _claim(text: str, rule: str, found: Reductions, percent: float, ours: float, passed: bool) -> Claim:
    return Claim(text=text, paper=percent, ours=ours, spread=found.spread, passed=bool(passed), unit="%", rule=rule)


def near(text: str, paper: float, ours: float, *, unit: str, tolerance: float) -> Claim:
    """A number within a relative tolerance, nothing drawn."""
    return Claim(text=text, paper=paper, ours=ours, unit=unit, passed=abs(ours - paper) <= tolerance * abs(paper))


def is_true(text: str, paper: str, ours: str, passed: bool) -> Claim:
    """A statement without a number."""
    return Claim(text=text, paper=paper, ours=ours, passed=passed)
