"""Picture and table of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadgen import plots
from loadgen.experiments.comparison.compare import Comparison


def draw(found: Comparison, stem: Path) -> list[Path]:
    """Draw the live over the simulated delay of each task with the diagonal, and the sorted errors."""
    numbers = found.as_object()
    fig, (left, right) = plots.figure(9.5, 4.2, 1, 2)
    kinds = sorted({one.kind for one, _ in found.pairs})
    for index, kind in enumerate(kinds):
        mine = [(one.delay_s, other.delay_s) for one, other in found.pairs if one.kind == kind]
        left.scatter(
            [x for x, _ in mine], [y for _, y in mine], s=24, color=plots.CYCLE[index], marker="os^vDPX"[index % 7],
            label=f"{kind} ({len(mine)})", linewidths=0, alpha=0.9,
        )  # fmt: skip
    top = 1.05 * max(max(one.delay_s or 0, other.delay_s or 0) for one, other in found.pairs)
    left.plot([0, top], [0, top], color=plots.GREY, linewidth=1, linestyle="--", label="equal")
    left.set(xlim=(0, top), ylim=(0, top), xlabel="simulated delay (s)", ylabel="live delay (s)", aspect="equal")
    left.legend(loc="upper left", frameon=False)
    errors = sorted(100 * ((other.delay_s or 0) / (one.delay_s or 1) - 1) for one, other in found.pairs)
    right.axhline(0, color=plots.GREY, linewidth=1)
    right.scatter(range(1, len(errors) + 1), errors, s=18, color=plots.BLUE, linewidths=0)
    right.set(xlabel="tasks, in the order of their error", ylabel="live over simulated delay (%)")
    largest = max(12.0, 1.15 * max(abs(error) for error in errors))
    right.set_ylim(-largest, largest)
    agreement = f"same placement {100 * numbers['same_placement']:.0f} %, mean ratio {numbers['mean_ratio']:.3f}"
    error = f"median error {100 * numbers['median_error']:.1f} %"
    title = f"{numbers['tasks']} tasks, time scale {found.time_scale:.1f}: {agreement}, {error}"
    fig.suptitle(title, fontsize=10)
    return plots.save(fig, stem)


def rows(found: Comparison) -> list[dict[str, Any]]:
    """One CSV row per task."""
    by_id = {outcome.task_id: outcome for outcome in found.live}
    table = []
    for one in found.simulated:
        other = by_id[one.task_id]
        row: dict[str, Any] = {"task_id": one.task_id, "model": one.model, "samples": one.samples}
        for name, outcome in (("simulated", one), ("live", other)):
            place = outcome.placement
            row |= {
                f"{name}_kind": outcome.kind,
                f"{name}_edge": place.edge if place else None,
                f"{name}_cut1": place.cut1_name if place else None,
                f"{name}_cut2": place.cut2_name if place else None,
                f"{name}_wait_s": outcome.wait_s,
                f"{name}_delay_s": outcome.delay_s,
            }
        table.append(row)
    return table
