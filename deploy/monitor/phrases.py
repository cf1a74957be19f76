"""Texts for placements and links, shared by `top`, `ui`, `tail`, `explain` and `plan`."""

from __future__ import annotations

from collections.abc import Sequence

from bus.text.units import format_count, format_rate, format_share
from bus.values import DELAY_PARTS, Codec, Kind, Placement, Route
from planner.service.prediction_errors import PredictionErrors

STATION_NAMES = dict(zip(DELAY_PARTS, ("device", "link 1", "edge", "link 2", "cloud", "results"), strict=True))
"""Name of each part of a delay, in the order in which a sample passes them."""

_CUT_AT = {Kind.DEVICE_EDGE: (0,), Kind.DEVICE_CLOUD: (0,), Kind.EDGE_CLOUD: (1,), Kind.DEVICE_EDGE_CLOUD: (0, 1)}


def cut_names(kind: Kind, cut1_name: str, cut2_name: str) -> tuple[str, ...]:
    """The layers after which a model is cut; empty where one tier computes all of it."""
    return tuple((cut1_name, cut2_name)[at] for at in _CUT_AT.get(kind, ()))


def cuts_text(placement: Placement) -> str:
    """`cut after conv | pool`, or `uncut`; several routes by numbers of layers: `2 routes: 82 % 4 | 9, 18 % device`.

    One route with codecs: `cut after conv q8 | pool zstd`.
    """
    routes = placement.routes
    if routes is not None and len(routes) > 1:
        return f"{len(routes)} routes: {', '.join(map(route_text, routes))}"
    if routes is not None:
        return f"cut after {' | '.join(coded_names(placement, routes[0]))}"
    names = cut_names(placement.kind, placement.cut1_name, placement.cut2_name)
    return f"cut after {' | '.join(names)}" if names else "uncut"


def coded_names(placement: Placement, route: Route) -> list[str]:
    """The layers after which a placement of one route is cut, with codecs; also `input`, if it is encoded."""
    crossings = [(placement.cut1_name, route.codec1)] if route.cut1 or route.codec1 is not Codec.RAW else []
    if route.cut1 != route.cut2 and placement.uses_cloud:
        crossings.append((placement.cut2_name, route.codec2))
    return [name if codec is Codec.RAW else f"{name} {codec.value}" for name, codec in crossings]


def route_text(route: Route) -> str:
    """`52 % 4 | 9`: the share of a route, and the numbers of the layers after which the model is cut.

    With codecs: `52 % 4 q8 | 9 zstd`.
    """
    crossings = ((route.cut1, route.codec1), (route.cut2, route.codec2))
    where = " | ".join(f"{cut}" if codec is Codec.RAW else f"{cut} {codec.value}" for cut, codec in crossings)
    return f"{format_share(route.share)} {'device' if route.device_only else where}"


def cut_column(kind: Kind, cut1_name: str, cut2_name: str) -> str:
    """`conv, pool` for a column "cut after"; `edge alone` where nothing is cut."""
    return ", ".join(cut_names(kind, cut1_name, cut2_name)) or f"{kind.value} alone"


def tiers_text(family: str, edge: str | None) -> str:
    """`device+e1`, `device+(e1)+cloud`: the tiers of a kind or family; an edge in parentheses only passes on."""
    tiers = family.split("+")
    if edge is None:
        return family
    if "edge" in tiers:
        return "+".join(edge if tier == "edge" else tier for tier in tiers)
    return "+".join([*tiers[:-1], f"({edge})", tiers[-1]])


def grants_text(placement: Placement) -> str:
    """`117 Mbps on link 1, 20 Mbps on link 2`: what is reserved."""
    grants = ((1, placement.link1_bps), (2, placement.link2_bps))
    return ", ".join(f"{format_rate(bps)} on link {link}" for link, bps in grants if bps)


def place_text(placement: Placement) -> str:
    """`edge+cloud through e1, cut after conv, 117 Mbps on link 1`: where a task is."""
    through = f" through {placement.edge}" if placement.edge else ""
    return ", ".join(filter(None, (f"{placement.kind.value}{through}", cuts_text(placement), grants_text(placement))))


def used_text(granted_bps: int, capacity_bps: int) -> str:
    """`40 Mbps of 100 Mbps`: how much of a link is granted."""
    return f"{format_rate(granted_bps) if granted_bps else '0'} of {format_rate(capacity_bps)}"


def signed_share(error: float | None) -> str:
    """`+25 %`: a relative error; "" if it is not known."""
    if error is None:
        return ""
    return ("+" if error > 0 else "") + format_share(error)


def error_text(errors: PredictionErrors) -> str:
    """`median 12 % of the prediction, last 50 tasks`: how far predictions were off."""
    if errors.median is None:
        return "no prediction has been compared yet"
    return f"median {format_share(errors.median)} of the prediction, last {format_count(len(errors), 'task')}"


def taught_by(tasks: Sequence[str]) -> str:
    """`3 tasks, the last t7`: where an estimate comes from."""
    return f"{format_count(len(tasks), 'task')}, the last {tasks[-1]}" if tasks else "probes"


def some(names: Sequence[str], limit: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
