"""What the paper claims, what we found, and whether that passes. The rules stand beside the paper's numbers.

"about X %" passes from X - 5 points up, on the mean over the x axis; "up to X %" when the best x reaches X;
"over X %" is strict. More than the paper's reduction passes too, since the aim is to reach it; the report
then shows by how much we differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ABOUT_POINTS = 5.0
"""How far "about" reaches, in percentage points."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement of the paper beside ours."""

    text: str  # what is claimed
    paper: str  # the paper's value
    ours: str  # ours
    spread: str  # over the seeds; "exact" where nothing is drawn
    passed: bool

    def as_row(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "text": self.text,
            "paper": self.paper,
            "ours": self.ours,
            "spread": self.spread,
            "pass": self.passed,
        }

    def line(self) -> str:
        """As the plots print it."""
        spread = "" if self.spread == "exact" else f" ({self.spread})"
        return f"{'PASS' if self.passed else 'MISS'}  {self.text}: paper {self.paper}, ours {self.ours}{spread}"


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
    return _claim(text, f"about {percent:g} %", found, found.mean, found.mean >= percent - ABOUT_POINTS)


def over(text: str, found: Reductions, percent: float) -> Claim:
    """More than `percent`, on the mean over the x axis."""
    return _claim(text, f"over {percent:g} %", found, found.mean, found.mean > percent)


def up_to(text: str, found: Reductions, percent: float) -> Claim:
    """At least `percent` at the best x."""
    return _claim(text, f"up to {percent:g} %", found, found.best, found.best >= percent, "up to ")


def _claim(text: str, paper: str, found: Reductions, ours: float, passed: bool, prefix: str = "") -> Claim:
    return Claim(text, paper, f"{prefix}{ours:.1f} %", f"sd {found.spread:.1f} points", bool(passed))


def near(text: str, paper: float, ours: float, *, unit: str, tolerance: float) -> Claim:
    """A number within a relative tolerance, nothing drawn."""
    passed = abs(ours - paper) <= tolerance * abs(paper)
    return Claim(text, f"{paper:g} {unit}", f"{ours:.4g} {unit}", "exact", passed)


def is_true(text: str, paper: str, ours: str, passed: bool, *, spread: str = "exact") -> Claim:
    """A statement without a number of its own."""
    return Claim(text, paper, ours, spread, passed)


def all_pass(claims: Sequence[Claim]) -> bool:
    """Whether every claim passes."""
    return all(claim.passed for claim in claims)
