"""Terminal and JSON output of measured codecs."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

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
