"""Terminal and JSON output of measured codecs."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from stages.calibration.measurement import MeasuredCodecs
from stages.calibration.samples import lowest_proven
from stages.models.model import Model


def codec_rows(model: Model, found: MeasuredCodecs) -> list[dict[str, Any]]:
    """One row for each codec at each cut: how much smaller, how fast in raw bytes, and its agreement alone."""
    rows = []
    for one in found.codecs:
        cut = model.manifest.cuts[one.position]
        rows.append(
            {
                "model": model.name,
                "cut": one.position,
                "name": cut.name,
                "codec": one.codec.value,
                "ratio": cut.cut_bytes / one.bytes,
                "encode_bytes_per_s": cut.cut_bytes / one.encode_s if one.encode_s else None,
                "decode_bytes_per_s": cut.cut_bytes / one.decode_s if one.decode_s else None,
                "agreement": 1.0 if one.codec.lossless else one.agreement,
            }
        )
    return rows


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
            *("" if rate is None else f"{rate / 1e6:,.0f} MB/s" for rate in rates),
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
