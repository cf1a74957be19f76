"""Plot of `deepar plan`: delay over the bandwidth of each link, coloured by the best cuts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bus.text.units import format_rate
from loadgen import plots
from planner.search.what_if import Situation, Stretch, WhatIfPlan, stretches, sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 160
"""Number of bandwidths for which each panel computes the best plan."""

HATCHES = ("", "//", "..", "xx")
"""Hatch for each pass through the colours, so that many pairs of cuts remain distinguishable."""

MOST_IN_LEGEND = 16
"""Maximum number of legend entries."""

MOST_LETTERS = 36
"""Maximum length of a legend entry; a longer one is shortened in its middle."""


def draw_plan(situation: Situation, path: Path) -> None:
    """Write the chart; the suffix of the path selects the format."""
    plots.save(plan_figure(situation), path.with_suffix(""), [path.suffix.removeprefix(".")])


def plan_figure(situation: Situation) -> Figure:
    """One panel per link, from a hundredth of its bandwidth to a hundred times."""
    figure, panels = plots.figure(11.0, 4.2, 1, 2, sharey=True)
    looks: dict[tuple[int, int], tuple[str, str]] = {}
    found = [_best(situation, link) for link in (1, 2)]
    for link, axes, (bandwidths, best) in zip((1, 2), panels, found, strict=True):
        here, other = situation.link1_bps, situation.link2_bps
        if link == 2:
            here, other = other, here
        _colour(axes, situation, _touching(stretches(bandwidths, best)), looks)
        shown = [(bps / 1e6, 1e3 * plan.delay_s) for bps, plan in zip(bandwidths, best, strict=True) if plan]
        if shown:
            axes.plot(*zip(*shown, strict=True), color="black", lw=1.5)
        named = "given bandwidth" if link == 2 else None
        axes.axvline(max(here, 1000) / 1e6, color="black", lw=0.8, ls=":", label=named)
        axes.set(xscale="log", yscale="log", xlabel=f"link {link} (Mbps); the other {format_rate(other)}")
        axes.set_xlim(bandwidths[0] / 1e6, bandwidths[-1] / 1e6)
        plots.log_ticks(axes.xaxis, bandwidths[0] / 1e6, bandwidths[-1] / 1e6)
    delays_ms = [1e3 * plan.delay_s for _, best in found for plan in best if plan is not None]
    if delays_ms:
        low, high = 0.93 * min(delays_ms), 1.07 * max(delays_ms)
        panels[0].set_ylim(low, high)
        plots.log_ticks(panels[0].yaxis, low, high)
    panels[0].set_ylabel("delay of the best plan (ms)")
    samples = f"{situation.samples} sample{'s' * (situation.samples != 1)}"
    figure.suptitle(f"{situation.device.model}, {samples}, {situation.objective.value}", fontsize=11)
    figure.legend(loc="outside right upper", title="best cuts", frameon=False, fontsize=8)
    return figure


def _best(situation: Situation, link: int) -> tuple[list[int], list[WhatIfPlan | None]]:
    """Bandwidths of a link, and the best plan for each; None where no plan fits."""
    here = max(situation.link1_bps if link == 1 else situation.link2_bps, 1000)
    bandwidths = [int(bps) for bps in np.geomspace(here / 100, here * 100, POINTS)]
    return bandwidths, sweep(situation, link, bandwidths)


def _touching(found: Sequence[Stretch]) -> list[tuple[float, float, tuple[int, int]]]:
    """(from, to, cuts) of adjacent stretches; each border is the geometric mean of the two nearest computed bandwidths."""
    step = 100 ** (2 / (POINTS - 1))
    spans: list[tuple[float, float, tuple[int, int]]] = []
    for index, here in enumerate(found):
        start, end = float(here.from_bps), float(here.to_bps)
        if index and here.from_bps <= 1.01 * step * found[index - 1].to_bps:
            start = math.sqrt(here.from_bps * found[index - 1].to_bps)
        if index + 1 < len(found) and found[index + 1].from_bps <= 1.01 * step * here.to_bps:
            end = math.sqrt(here.to_bps * found[index + 1].from_bps)
        spans.append((start, end, (here.cut1, here.cut2)))
    return spans


def _colour(
    axes: Any,
    situation: Situation,
    spans: Sequence[tuple[float, float, tuple[int, int]]],
    looks: dict[tuple[int, int], tuple[str, str]],
) -> None:
    """Fill the spans; `looks` maps pairs of cuts to colour and hatch, shared by both panels."""
    for start, end, cuts in spans:
        label = None
        if cuts not in looks:
            turn, place = divmod(len(looks), len(plots.CYCLE) - 1)  # without black, the colour of the line
            looks[cuts] = (plots.CYCLE[place], HATCHES[turn % len(HATCHES)])
            label = cuts_text(situation, *cuts) if len(looks) <= MOST_IN_LEGEND else None
        colour, hatch = looks[cuts]
        axes.axvspan(
            start / 1e6, end / 1e6, facecolor=colour, hatch=hatch, edgecolor="white", alpha=0.35, lw=0, label=label
        )


def cuts_text(situation: Situation, cut1: int, cut2: int) -> str:
    """Legend entry of two cuts: the layers before them and the tiers that compute."""
    names, last = situation.device, situation.device.layers
    if cut1 == last:
        return "device alone"
    if cut2 == 0:
        return "cloud alone"
    if (cut1, cut2) == (0, last):
        return "edge alone"
    tiers = [
        tier for tier, computes in (("device", cut1 > 0), ("edge", cut1 < cut2), ("cloud", cut2 < last)) if computes
    ]
    cuts = ", ".join(dict.fromkeys(names.cut_name(cut) for cut in (cut1, cut2) if 0 < cut < last))
    return f"{plots.shortened(cuts, MOST_LETTERS)}: {', '.join(tiers)}"
