"""Style of all plots: one font size, colours suitable for colour-blind readers, and a hatch for each colour.

Colours are those of Okabe and Ito, "Color Universal Design" (2008). Figures are made without a window system
and written as PNG (150 dpi) and as SVG without dates, so the same data gives the same files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib is slow to import, so it is imported when the first figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, WINE = "#8A8A8A", "#882255"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, BLACK)

POLICY_LOOKS: dict[str, tuple[str, str, str]] = {
    "device-only": (ORANGE, "//", "s"),
    "edge-only": (SKY, "\\\\", "^"),
    "cloud-only": (PURPLE, "xx", "v"),
    "neurosurgeon": (GREEN, "..", "D"),
    "no-delay": (VERMILION, "--", "P"),
    "deepar": (BLUE, "", "o"),
    "routes": (YELLOW, "oo", "h"),
    "elastic": (WINE, "++", "X"),
    "deepar (sequential)": (GREY, "..", "*"),
    "deepar (without codecs)": (BLACK, "//", "d"),
}
"""Policy -> (colour, hatch of a bar, marker of a line)."""

POLICY_LABELS = {
    "device-only": "Device only",
    "edge-only": "Edge only",
    "cloud-only": "Cloud only",
    "neurosurgeon": "Neurosurgeon",
    "no-delay": "No delay",
    "deepar": "DeePar",
    "routes": "Several routes",
    "elastic": "DeePar, elastic",
    "deepar (sequential)": "DeePar, sequential",
    "deepar (without codecs)": "DeePar, without codecs",
}

_STYLE: Any = {  # matplotlib types the keys as one large literal
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "svg.hashsalt": "deepar",  # keeps the ids in the SVG the same between runs
    "hatch.linewidth": 0.6,
}


def look(policy: str, index: int = 0) -> tuple[str, str, str]:
    """Colour, hatch and marker of a policy; a user's own policy takes the `index`-th of the cycle."""
    return POLICY_LOOKS.get(policy, (CYCLE[index % len(CYCLE)], ("++", "oo", "**")[index % 3], "X"))


def label(policy: str) -> str:
    """Name of a policy in legends."""
    return POLICY_LABELS.get(policy, policy)


def figure(width_in: float, height_in: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure in this style and its axes (an array if there are several). The layout keeps labels from overlapping."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        fig = Figure(figsize=(width_in, height_in), layout="constrained")
        return fig, fig.subplots(rows, columns, **kwargs)


UNDATED = {"svg": {"Date": None}, "png": {"Software": None}, "pdf": {"CreationDate": None}}
"""Format -> metadata that is omitted, so the same data gives the same bytes."""


def save(fig: Figure, stem: Path, formats: Iterable[str] = ("png", "svg")) -> list[Path]:
    """Write `STEM.png` and `STEM.svg`; returns the paths."""
    import matplotlib as mpl

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(_STYLE):
        for suffix in formats:
            path = stem.with_name(f"{stem.name}.{suffix}")
            fig.savefig(path, metadata=UNDATED.get(suffix.lower()))
            paths.append(path)
    return paths


def grouped_bars(
    axes: Axes,
    groups: list[str],
    series: dict[str, list[float]],
    errors: dict[str, list[float | None]] | None = None,
    *,
    values: bool = False,
) -> None:
    """Draw the bars of each policy side by side in each group, in the order of `series`, with error bars if given."""
    width = 0.8 / max(1, len(series))
    for index, (policy, heights) in enumerate(series.items()):
        colour, hatch, _ = look(policy, index)
        places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(
            places,
            heights,
            width * 0.92,
            label=label(policy),
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.6,
        )
        if errors is not None:
            axes.errorbar(
                places,
                heights,
                yerr=error_bars(errors[policy]),
                fmt="none",
                ecolor="#333333",
                elinewidth=0.9,
                capsize=2,
            )
        if values:
            axes.bar_label(bars, fmt="{:.3g}", fontsize=8, padding=2)
    axes.set_xticks(range(len(groups)), groups)


def error_bars(half_widths: Iterable[float | None]) -> list[float]:
    """Error bars for matplotlib; NaN, which is not drawn, for an unknown interval."""
    return [math.nan if half is None else half for half in half_widths]


LOG_STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
FEWEST_TICKS, MOST_TICKS = 4, 10


def log_ticks(axis: Any, low: float, high: float) -> None:
    """At least four labelled ticks at round numbers on a logarithmic axis, for any range."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in LOG_STEPS:
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= FEWEST_TICKS:
            break
    else:
        ticks = [
            tick for tick in MaxNLocator(6, min_n_ticks=FEWEST_TICKS).tick_values(low, high) if low <= tick <= high
        ]
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // MOST_TICKS)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def shortened(name: str, most: int) -> str:
    """A name of at most `most` characters with its middle omitted, because the ends of layer names differ."""
    if len(name) <= most:
        return name
    head = most // 3
    return f"{name[:head]}…{name[head + 1 - most :]}"
