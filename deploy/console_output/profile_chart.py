"""Bar chart of a profile: delay and output size of each layer, as in the paper's Fig. 1(b).

Few layers are drawn side by side. Many layers are listed from top to bottom, with delay and size in separate panels, so that
their names do not overlap. The height is bounded: beyond `MOST_NAMES` layers only every second, third, ... name is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bus.text.units import format_seconds
from bus.values import ModelProfile
from loadgen import plots
from stages.models.profiler import Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ACROSS = 30
"""Maximum number of layers that are drawn side by side."""

MOST_NAMES = 100
"""Maximum number of names in the list from top to bottom."""

NAME_IN = 0.13
"""Height of one name in inches."""

MOST_LETTERS = 40


def draw_profile(found: Measurement, profile: ModelProfile, path: Path) -> None:
    """Write the chart; the suffix of the path selects the format."""
    title = f"{found.model.name} on {profile.platform}: {format_seconds(found.whole_s)} in one piece"
    sizes = [layer.output_bytes for layer in found.layers]
    plots.save(profile_figure(profile, sizes, title), path.with_suffix(""), [path.suffix.removeprefix(".")])


def profile_figure(profile: ModelProfile, output_bytes: list[int], title: str) -> Figure:
    """The chart of a profile with the output size of each layer."""
    scale, unit = (1e3, "ms") if max(profile.layer_s) >= 1e-4 else (1e6, "us")
    delays = [scale * seconds for seconds in profile.layer_s]
    sizes = [size / 1e3 for size in output_bytes]
    names = [plots.shortened(name, MOST_LETTERS) for name in profile.layer_names]
    draw = _across if len(names) <= MOST_ACROSS else _down
    return draw(names, delays, sizes, f"delay of the layer ({unit})", title)


def _across(names: list[str], delays: list[float], sizes: list[float], delay_label: str, title: str) -> Figure:
    places = range(len(names))
    figure, left = plots.figure(max(7.0, 0.36 * len(names) + 1.0), 4.4)
    right = left.twinx()
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
    right.spines["top"].set_visible(False)
    left.bar([x - 0.2 for x in places], delays, 0.4, color=plots.BLUE, label="delay (left axis)")
    right.bar(
        [x + 0.2 for x in places], sizes, 0.4, color=plots.ORANGE, hatch="//", edgecolor="white", linewidth=0.6,
        label="output size (right axis)",
    )  # fmt: skip
    left.set_xticks(list(places), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    left.set_ylabel(delay_label)
    left.set_title(title)
    right.set_ylabel("size of its output (kB)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _down(names: list[str], delays: list[float], sizes: list[float], delay_label: str, title: str) -> Figure:
    step = -(-len(names) // MOST_NAMES)
    figure, (left, right) = plots.figure(10.0, 1.2 + NAME_IN * min(len(names), MOST_NAMES), 1, 2, sharey=True)
    figure.suptitle(title, fontsize=11)
    places = range(len(names))
    left.barh(places, delays, 0.8, color=plots.BLUE)
    right.barh(places, sizes, 0.8, color=plots.ORANGE)
    left.set_yticks(list(places)[::step], names[::step], fontsize=7)
    left.set_ylim(len(names) - 0.4, -0.6)
    for axes, label in ((left, delay_label), (right, "size of its output (kB)")):
        axes.set_xlabel(label)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
    return figure
