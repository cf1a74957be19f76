"""The choices of Algorithm 1, with one route or a mix of several, and their form in messages: placements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from bus.unchecked_constructors import maker
from bus.values import MAX_ROUTES, Kind, Objective, Placement, Route
from planner.search.codec_search import CodecSearch, PathSearch
from planner.search.cost import RAW, Overheads
from planner.search.families import ALL_THREE, DEVICE_CLOUD, DEVICE_EDGE
from planner.search.request import EdgeOption, Request
from planner.search.route_search import Mix, MixedRoute, RouteSearch

SLOWER_LINKS: Final = (4, 16)
"""How many times slower than its grant link 1 is thought to be, for the routes that stand by."""
_NO_PRICES: Final = (0.0,) * 7
_placement, _route = maker(Placement), maker(Route)

Priced = tuple[float, int, Any]
"""What a search finds for a family at given grants: its delay, cut1 and cut2.

Of several routes, or with codecs: a lower bound of the delay that never rises with a grant, 1 if the device computes (else
0), and the `Mix`.
"""

Search = Callable[..., Priced | None]
"""A prepared search, and the parameters of `CutSearch.best`."""


class Choice(NamedTuple):
    """A placement that fits: the resources to reserve, the start, and the delay."""

    family: int
    edge: str | None
    cut1: int  # of several routes: of the one with the largest share that is not on the device alone
    cut2: int
    link1_bps: int
    link2_bps: int
    start_s: float  # ledger time
    delay_s: float  # w
    routes: tuple[MixedRoute, ...] = ()  # by falling share; empty: one route, cut1 and cut2, without codecs

    @property
    def cut_pairs(self) -> tuple[tuple[int, int], ...]:
        """The cuts of each route."""
        if not self.routes:
            return ((self.cut1, self.cut2),)
        return tuple((route.cut1, route.cut2) for route in self.routes)

    @property
    def uses_device(self) -> bool:
        """The device computes layers."""
        return self.cut1 > 0 or (self.routes != () and any(route.cut1 > 0 for route in self.routes))

    @property
    def uses_slot(self) -> bool:
        """The edge computes layers."""
        return self.cut1 != self.cut2 or (self.routes != () and any(cut1 != cut2 for cut1, cut2 in self.cut_pairs))


def best_way(
    search: CodecSearch,
    family: int,
    link1_bps: float,
    link2_bps: float,
    samples: int,
    objective: Objective,
    input_bytes: int | None,
    device_free: bool,
    overheads: Overheads,
) -> Priced | None:
    """The best cuts and codecs of a family, as a mix of one route; see `Priced`."""
    found = search.best(family, link1_bps, link2_bps, samples, objective, input_bytes, device_free, overheads)
    if found is None:
        return None
    delay_s, cut1, cut2, codecs = found
    return delay_s, cut1, Mix(delay_s, delay_s, (MixedRoute(cut1, cut2, 1.0, codecs),), delay_s, _NO_PRICES, 0.0)


def best_mix(
    search: PathSearch,
    family: int,
    link1_bps: float,
    link2_bps: float,
    samples: int,
    objective: Objective,
    input_bytes: int | None,
    device_free: bool,
    overheads: Overheads,
    *,
    alone: bool = True,
) -> Priced | None:
    """The best mix of a family's routes; see `Priced`. `alone`: whether the device may compute whole samples."""
    routes: RouteSearch | None = search.beside
    if routes is None:
        routes = search.beside = RouteSearch(search)
    mix = routes.best(family, link1_bps, link2_bps, samples, input_bytes, device_free, overheads, alone)
    return None if mix is None else (mix.bound_s, int(any(route.cut1 for route in mix.routes)), mix)


def mixed_choice(
    mix: Mix, family: int, edge: str, grants_bps: tuple[int, int], start_s: float, layers: int
) -> Choice | None:
    """A mix as a choice. None: it does not use all that its family reserves, so a smaller family offers it as well."""
    routes = mix.routes
    computes = any(cut1 != cut2 for cut1, cut2, *_ in routes)
    sends = any(cut2 != layers for _, cut2, *_ in routes)
    if family != (ALL_THREE if computes and sends else DEVICE_EDGE if computes else DEVICE_CLOUD):
        return None
    largest = next(route for route in routes if route.cut1 < layers)
    if len(routes) == 1 and largest.codecs == RAW:
        routes = ()
    return Choice(family, edge, largest.cut1, largest.cut2, *grants_bps, start_s, mix.delay_s, routes)


def placement_of(request: Request, choice: Choice, option: EdgeOption | None) -> Placement:
    """A choice of this option, as the value that messages carry."""
    row, cut1, cut2 = request.device_row, choice.cut1, choice.cut2
    kind, routes = Kind.of(cut1, cut2, row.layers), None
    costs = None if option is None else option.search.costs
    if choice.routes:
        kind, routes = (
            Kind.of_all(choice.cut_pairs, row.layers),
            routes_of(request, choice, _standing_by(request, choice)),
        )
    return _placement(
        kind=kind,
        edge=choice.edge,
        cut1=cut1,
        cut2=cut2,
        cut1_name=row.names[cut1 - 1] if cut1 else "input",
        cut2_name=row.names[cut2 - 1] if cut2 else "input",
        link1_bps=choice.link1_bps,
        link2_bps=choice.link2_bps,
        routes=routes,
        edge_batch=costs.edge_load if costs is not None and choice.uses_slot else None,
        cloud_batch=costs.cloud_load if costs is not None and "cloud" in kind.value else None,
    )


def _standing_by(request: Request, choice: Choice) -> list[MixedRoute]:
    """Routes without a share that the task would take if link 1 carried less than its grant. They need nothing more."""
    option = request.edge(choice.edge)
    if option is None or len(choice.routes) < 2 or option.search.beside is None:
        return []
    known = {(route.cut1, route.cut2) for route in choice.routes}
    found: list[MixedRoute] = []
    for factor in SLOWER_LINKS:
        mix: Mix | None = option.search.beside.best(
            choice.family,
            choice.link1_bps / factor,
            choice.link2_bps,
            request.samples,
            request.input_bytes,
            choice.uses_device,
            option.overheads,
            request.alone,
        )
        for route in () if mix is None else mix.routes:
            if (route.cut1, route.cut2) not in known and len(known) < MAX_ROUTES:
                known.add((route.cut1, route.cut2))
                found.append(route._replace(share=0.0))
    return found


def routes_of(request: Request, choice: Choice, more: Sequence[MixedRoute] = ()) -> tuple[Route, ...]:
    """The routes of a choice and more, with their station times at its grants."""
    option = request.edge(choice.edge)
    costs = (request.device_search if option is None else option.search).costs
    return tuple(
        _route(
            cut1=cut1,
            cut2=cut2,
            share=share,
            codec1=codecs[0],
            codec2=codecs[1],
            stations_s=tuple(
                costs.sample_parts(
                    cut1, cut2, choice.link1_bps or 1, choice.link2_bps or 1, request.input_bytes, codecs
                )
            ),
        )
        for cut1, cut2, share, codecs in (*choice.routes, *more)
    )
