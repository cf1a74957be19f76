"""Result of a figure: claims with verdicts, data series, and the files written."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bus.values import Objective
from loadgen.experiments.claims import Claim, Verdict

POLICIES = ("device-only", "edge-only", "cloud-only", "no-delay", "deepar")
"""The paper's bars in the paper's order, with Algorithm 1 without its lines 6-8 before the whole of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureOptions:
    """User options of a figure."""

    out: Path  # where the files go
    seeds: int = 10  # how many seeds, from 0
    policies: tuple[str, ...] = POLICIES
    objective: Objective = Objective.SEQUENTIAL
    profile: str = "paper"
    reachable: tuple[int | None, ...] = (1, 2, None)  # E_i of Figure 4: a panel and a verdict on every claim for each
    jobs: int = 1
    cluster: str | None = None  # address of a Dask scheduler
    live: bool = False  # of fig1a: measure this machine
    plain: bool = False  # pictures without title, claims and notes, for use in a paper
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
    """The result of making one figure."""

    figure: str
    seeds: tuple[int, ...]  # those that the verdicts rest on; empty where nothing is drawn at random
    claims: tuple[Claim, ...]
    series: tuple[dict[str, Any], ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = field(default=())  # assumptions that stand beside the plot

    @property
    def missed(self) -> bool:
        """Whether a statement of the paper is missed. A claim of our own that is not shown is not a miss."""
        return any(claim.verdict is Verdict.MISSES for claim in self.claims)

    def as_object(self) -> dict[str, Any]:
        """What `deepar simulate FIG --json` prints."""
        return {
            "figure": self.figure,
            "seeds": len(self.seeds),
            "seed_numbers": list(self.seeds),
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
