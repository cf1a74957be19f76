"""The bar chart of a profile: every layer's delay and output size, as in the paper's Fig. 1(b)."""

from __future__ import annotations

from pathlib import Path

from bus.units import format_seconds
from bus.values import ModelProfile
from stages.profiler import Measurement

MOST_NAMES = 60
"""With more layers the names would overlap; their numbers are shown."""


def draw_profile(found: Measurement, profile: ModelProfile, path: Path) -> None:
    """Writes the chart; the suffix says which format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = found.layers
    scale, unit = (1e3, "ms") if max(profile.layer_s) >= 1e-4 else (1e6, "us")
    places = range(len(layers))
    figure, delay = pyplot.subplots(figsize=(max(7.0, 0.36 * min(len(layers), 80)), 4.2), layout="constrained")
    size = delay.twinx()
    delay.bar([x - 0.2 for x in places], [scale * s for s in profile.layer_s], 0.4, color="#30638e", label="delay")
    size.bar(
        [x + 0.2 for x in places], [layer.output_bytes / 1e3 for layer in layers], 0.4, color="#edae49", label="output"
    )
    names = [layer.name if len(layers) <= MOST_NAMES else str(layer.position) for layer in layers]
    step = 1 if len(layers) <= MOST_NAMES else len(layers) // 40
    delay.set_xticks(list(places)[::step], [name[-24:] for name in names][::step], rotation=60, ha="right", fontsize=8)
    delay.set_ylabel(f"delay of the layer ({unit})")
    size.set_ylabel("size of its output (kB)")
    delay.set_title(f"{found.model.name} on {profile.platform}: {format_seconds(found.whole_s)} in one piece")
    handles = [*delay.get_legend_handles_labels()[0], *size.get_legend_handles_labels()[0]]
    delay.legend(handles, ["delay", "output"], frameon=False)
    for axes in (delay, size):
        axes.spines["top"].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
