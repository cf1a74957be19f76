"""Terminal and JSON output of measured batches."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from stages.calibration.batch_times import SIZES, MeasuredBatches
from stages.models.model import Model


def batches_table(model: Model, found: MeasuredBatches) -> Table:
    """How many times as fast samples of each layer are computed in each batch."""
    table = Table(
        title=f"{escape(model.name)}: times as fast per sample, in batches of",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for title in ("layer", *map(str, SIZES), "results"):
        table.add_column(title, justify="left" if title in ("layer", "results") else "right")
    for row in batch_rows(model, found):
        factors = [row["factors"].get(str(size)) for size in SIZES]
        speeds = ("" if factor is None else f"{1 / max(factor, 1e-3):.2g}x" for factor in factors)
        table.add_row(escape(row["name"]), *speeds, _results(row["max_rel_diff"]))
    return table


def _results(difference: float | None) -> str:
    if difference is None:
        return "no batches possible"
    return "exact" if difference == 0 else f"differ by {difference:.1g}"


def batch_rows(model: Model, found: MeasuredBatches) -> list[dict[str, Any]]:
    """What `--json` says about batches: one row for each layer."""
    return [
        {
            "position": layer.position,
            "name": layer.name,
            "max_rel_diff": one.difference,
            "factors": {str(size): factor for size, factor in zip(SIZES, one.factors, strict=False)},
        }
        for layer, one in zip(model.graph.layers, found.layers, strict=True)
    ]
