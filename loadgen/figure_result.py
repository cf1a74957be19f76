"""What every figure yields: claims with a verdict, series of numbers, and the files it was drawn to."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bus.values import Objective
from loadgen import plots
from loadgen.claims import Claim

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICIES = ("device-only", "edge-only", "cloud-only", "no-delay", "deepar")
"""The paper's bars in the paper's order, with Algorithm 1 without its lines 6-8 before the whole of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureOptions:
    """What the user may choose for a figure."""

    out: Path  # where the files go
    seeds: int = 10  # how many seeds, from 0
    policies: tuple[str, ...] = POLICIES
    objective: Objective = Objective.SEQUENTIAL
    profile: str = "paper"
    reachable: tuple[int | None, ...] = (1, 2, None)  # E_i of Figure 4, a panel each; claims are judged on the first
    jobs: int = 1
    cluster: str | None = None  # address of a Dask scheduler
    live: bool = False  # of fig1a: measure this machine
    progress: Callable[[str, int, int], None] | None = None  # (what, done, in all)

    @property
    def suffix(self) -> str:
        """Of file names, so that the objectives do not overwrite each other."""
        return "" if self.objective is Objective.SEQUENTIAL else f"_{self.objective.value}"

    def tell(self, what: str) -> Callable[[int, int], None] | None:
        """The progress of one part."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)


@dataclass(frozen=True, slots=True)
class FigureResult:
    """One figure, made."""

    figure: str
    seeds: int
    claims: tuple[Claim, ...]
    series: tuple[dict[str, Any], ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = field(default=())  # assumptions that stand beside the plot

    @property
    def passed(self) -> bool:
        """Whether every claim passes."""
        return all(claim.passed for claim in self.claims)

    def as_object(self) -> dict[str, Any]:
        """What `deepar simulate FIG --json` prints."""
        return {
            "figure": self.figure,
            "seeds": self.seeds,
            "claims": [claim.as_row() for claim in self.claims],
            "series": list(self.series),
            "files": [str(path) for path in self.files],
            "notes": list(self.notes),
        }


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows with the union of their keys as columns, in the order of their first use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


LINE_IN, TITLE_IN, LEGEND_IN = 0.155, 0.30, 0.27
"""Heights in inches of a line of 8-point type, of a title, and of a legend."""


def finish(fig: Figure, title: str, claims: Sequence[Claim], notes: Sequence[str] = (), *, legend: Any = None) -> None:
    """A title and, from the axes `legend`, a legend above; the claims with their verdicts and the notes
    below.

    The figure grows by what they need, so that the axes keep their size and nothing overlaps.
    """
    lines = [claim.line() for claim in claims] + [f"Note: {note}" for note in notes]
    below_in = LINE_IN * len(lines) + 0.12
    above_in = TITLE_IN + (LEGEND_IN if legend is not None else 0.0)
    width_in, axes_in = fig.get_size_inches()
    height_in = axes_in + below_in + above_in
    fig.set_size_inches(width_in, height_in)
    rect = (0, below_in / height_in, 1, axes_in / height_in)
    fig.set_layout_engine("constrained", rect=rect)
    fig.text(0.5, 1 - 0.08 / height_in, title, fontsize=11, ha="center", va="top")
    if legend is not None:
        handles, names = legend.get_legend_handles_labels()
        place = (0.5, 1 - TITLE_IN / height_in)
        fig.legend(
            handles, names, loc="upper center", bbox_to_anchor=place, ncols=len(names), frameon=False, borderaxespad=0
        )
    for index, line in enumerate(lines):
        claim = claims[index] if index < len(claims) else None
        colour = "#555555" if claim is None else plots.BLACK if claim.passed else plots.VERMILION
        y_in = below_in - 0.03 - LINE_IN * (index + 1)
        fig.text(0.012, y_in / height_in, line, fontsize=8, color=colour, va="bottom")
