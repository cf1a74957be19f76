"""The plot of `deepar plan`: delay over the bandwidth of each link, coloured by the cuts that are best there."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bus.units import format_rate
from planner.plan import Situation, stretches, sweep

POINTS = 160
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#8A8A8A")
"""Okabe and Ito's, which the colour-blind can tell apart."""


def draw_plan(situation: Situation, path: Path) -> None:
    """Writes the chart; the suffix says which format. One panel a link, from a hundredth to a hundred times its bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
    figure, panels = pyplot.subplots(1, 2, figsize=(11.0, 4.2), layout="constrained", sharey=True)
    colours: dict[tuple[int, int], str] = {}
    names = situation.device
    for link, axes in zip((1, 2), panels, strict=True):
        here, other = situation.link1_bps, situation.link2_bps
        if link == 2:
            here, other = other, here
        here = max(here, 1000)
        bandwidths = [int(bps) for bps in np.geomspace(here / 100, here * 100, POINTS)]
        best = sweep(situation, link, bandwidths)
        for stretch in stretches(bandwidths, best):
            cuts = (stretch.cut1, stretch.cut2)
            new = cuts not in colours
            colour = colours.setdefault(cuts, COLOURS[len(colours) % len(COLOURS)])
            label = _cuts(situation, stretch.cut1, stretch.cut2) if new else None
            axes.axvspan(stretch.from_bps / 1e6, stretch.to_bps / 1e6, color=colour, alpha=0.35, lw=0, label=label)
        shown = [
            (bps / 1e6, 1e3 * plan.delay_s) for bps, plan in zip(bandwidths, best, strict=True) if plan is not None
        ]
        if shown:
            axes.plot(*zip(*shown, strict=True), color="black", lw=1.5)
        axes.axvline(
            here / 1e6, color="black", lw=0.8, ls=":", label="the bandwidth asked about" if link == 2 else None
        )
        axes.set(xscale="log", yscale="log", xlabel=f"link {link} (Mbps); the other {format_rate(other)}")
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2.0, 3.0, 5.0)))
        axes.yaxis.set_minor_formatter(plain)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("delay of the best plan (ms)")
    figure.suptitle(
        f"{names.model}, {situation.samples} sample{'s' * (situation.samples != 1)}, {situation.objective.value}"
    )
    figure.legend(loc="outside right upper", title="cuts after", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _cuts(situation: Situation, cut1: int, cut2: int) -> str:
    """What the legend calls two cuts; equal ones leave the edge out."""
    names = situation.device
    if cut1 == names.layers:
        return "nowhere: device alone"
    return ", ".join(dict.fromkeys((names.cut_name(cut1), names.cut_name(cut2))))
