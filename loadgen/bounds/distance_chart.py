"""Picture of the distance between policies and the bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loadgen import plots
from loadgen.bounds.distance import Distance


def draw(found: Sequence[Distance], stem: Path) -> list[Path]:
    """Draw the mean delays with the bound as a line, and each policy's distance to it with 95 % intervals over the seeds."""
    policies = list(found[0].means_s)
    groups = [_name(one) for one in found]
    wide = max(3.6, 0.9 + len(found) * (0.35 + 0.3 * len(policies)))
    fig, (left, right) = plots.figure(2 * wide, 3.8, 1, 2)
    plots.grouped_bars(left, groups, {policy: [one.mean_s(policy) for one in found] for policy in policies})
    for index, one in enumerate(found):
        left.hlines(
            one.bound_s, index - 0.46, index + 0.46, colors=plots.BLACK, linewidth=2, label=None if index else "Bound"
        )
    left.set_ylabel("mean delay (s)")
    plots.grouped_bars(
        right,
        groups,
        {policy: [100 * (one.ratio(policy) - 1) for one in found] for policy in policies},
        {policy: [_percent(one.half_width(policy)) for one in found] for policy in policies},
    )
    right.axhline(0, color=plots.BLACK, linewidth=1)
    right.set_ylabel("above the bound (%)")
    handles, names = left.get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4), frameon=False)
    return plots.save(fig, stem)


def _name(one: Distance) -> str:
    return "\n".join(f"{name} = {value}" for name, value in one.labels.items()) or "all seeds"


def _percent(half: float | None) -> float | None:
    return None if half is None else 100 * half
