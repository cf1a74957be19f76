"""Terminal and JSON output of measured codecs and batches."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from stages.calibration.batch_times import SIZES, MeasuredBatches
from stages.calibration.measurement import MeasuredCodecs, codec_rows
from stages.calibration.samples import lowest_proven
from stages.models.model import Model


def codecs_table(model: Model, found: MeasuredCodecs) -> Table:
    """A table of the codecs of each cut."""
    table = Table(title=f"{escape(model.name)}: codecs", title_justify="left", box=None, pad_edge=False)
    for title in ("cut", "after", "codec", "ratio", "encodes", "decodes", "agreement"):
        table.add_column(title, justify="left" if title in ("after", "codec") else "right")
    for row in codec_rows(model, found):
        rates = (row["encode_bytes_per_s"], row["decode_bytes_per_s"])
        table.add_row(
            str(row["cut"]),
            escape(row["name"]),
            row["codec"],
            f"{row['ratio']:.1f}x",
            *(f"{rate / 1e6:,.0f} MB/s" for rate in rates),
            "exact" if row["codec"] == "zstd" else f"{row['agreement']:.2%}",
        )
    return table


def agreement_line(found: MeasuredCodecs) -> str:
    """How agreements were measured, and what they prove."""
    pairs = f"{len(found.agreements)} pairs of lossy crossings measured"
    if not found.classes:
        return f"agreement: 1 minus the relative error of the outputs on {found.samples} samples; {pairs}"
    return (
        f"agreement: samples of {found.samples} with the same best class; all of them prove at least "
        f"{lowest_proven(found.samples):.1%} (95 % confidence); {pairs}"
    )


def codecs_report(model: Model, found: MeasuredCodecs) -> dict[str, Any]:
    """What `--json` says about codecs."""
    return {
        "codecs": codec_rows(model, found),
        "pairs": [one.model_dump(mode="json") for one in found.agreements],
        "calibration": {
            "samples": found.samples,
            "classes": found.classes,
            "lowest_proven": lowest_proven(found.samples) if found.classes else None,
            "file": found.calibration_file,
        },
    }


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
