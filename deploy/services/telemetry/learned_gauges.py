"""Gauges of what a planner has learned: speeds of models on nodes, and latencies of links.

Each is bounded to `MOST` series a region, chosen by name and not by age, so that the same ones stay: cloud and edges before
devices, and links between edges and cloud before those of devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from bus.values import Role
from planner.core.core import PlannerCore

MOST: Final = 100
"""Limit of the series of each gauge in one region."""


class LearnedGauge(NamedTuple):
    """One series: its labels, and its value."""

    labels: tuple[str, ...]
    value: float


class LearnedGauges(NamedTuple):
    """The series of one region."""

    factors: Sequence[LearnedGauge]  # labels: `at`, `model`, `alone` ("true": a device that runs the whole model)
    latencies_s: Sequence[LearnedGauge]  # labels: `link`, `device` ("" for link 2), `edge`


FACTOR_LABELS: Final = ("at", "model", "alone")
LATENCY_LABELS: Final = ("link", "device", "edge")


def learned_gauges(core: PlannerCore) -> LearnedGauges:
    """The gauges of one region."""
    devices = {name for name, node in core.nodes.items() if node.announced.role is Role.DEVICE}
    nodes = sorted(core.estimates.nodes, key=lambda key: (key[0] in devices, key))
    links = sorted(core.estimates.links, key=lambda key: (-key[0], key[2], key[1]))
    return LearnedGauges(
        [
            LearnedGauge((node, model, str(alone).lower()), core.estimates.nodes[node, model, alone].used.a)
            for node, model, alone in nodes[:MOST]
        ],
        [
            LearnedGauge((str(link), device, edge), core.estimates.links[link, device, edge].latency_s)
            for link, device, edge in links[:MOST]
        ],
    )


def by_region(cores: Mapping[str, PlannerCore]) -> dict[str, LearnedGauges]:
    """The gauges of each region."""
    return {region: learned_gauges(core) for region, core in cores.items()}
