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
"""The paper's bars in the paper's order; `no-delay` is Algorithm 1 without lines 6-8."""

RAW = "deepar (without codecs)"
"""Name of the `deepar` without codecs beside the one with them, in figures and sweeps that are made with codecs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureOptions:
    """User options of a figure."""

    out: Path  # folder for the files
    seeds: int = 10  # number of seeds
    policies: tuple[str, ...] = POLICIES
    objective: Objective = Objective.SEQUENTIAL
    codecs: bool = False  # Figure 4 only: whether activations may be encoded on the links
    min_agreement: float | None = None  # of lossy codecs that the tasks allow; None: lossless ones only
    profile: str = "paper"
    reachable: tuple[int | None, ...] = (1, 2, None)  # E_i of Figure 4: one panel and one set of verdicts for each
    jobs: int = 1
    cluster: str | None = None  # address of a Dask scheduler
    live: bool = False  # fig1a only: measure this machine
    plain: bool = False  # pictures without title, claims and notes, for use in a paper
    progress: Callable[[str, int, int], None] | None = None  # (part, done, total)

    @property
    def suffix(self) -> str:
        """Suffix of file names, so that the figures of other objectives, or with codecs, have files of their own."""
        objective = "" if self.objective is Objective.SEQUENTIAL else f"_{self.objective.value}"
        return objective + ("_codecs" if self.codecs else "")

    def tell(self, what: str) -> Callable[[int, int], None] | None:
        """Progress callback for one part."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)


@dataclass(frozen=True, slots=True)
class FigureResult:
    """The result of making one figure."""

    figure: str
    seeds: tuple[int, ...]  # seeds of the verdicts; empty if nothing is random
    claims: tuple[Claim, ...]
    series: tuple[dict[str, Any], ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = field(default=())  # assumptions, shown beside the plot

    @property
    def missed(self) -> bool:
        """Whether a statement of the paper is missed. A claim of our own that is not shown is not a miss."""
        return any(claim.verdict is Verdict.MISSES for claim in self.claims)

    def as_object(self) -> dict[str, Any]:
        """The object that `deepar simulate FIG --json` prints."""
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
