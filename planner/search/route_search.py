"""The best mix of routes through one edge: shares of a task's samples over all pairs of cuts, without trying mixes.

`bus.routes.shares` solves the linear program for the routes that it knows. This module finds the next route, the one with
the least F_r + sum_k y_k s_k(r) at the present prices y of the stations (column generation). What does not depend on
bandwidths and prices is prepared, so this is one product of a vector and a matrix. The mix is optimal once no route costs
less than the present objective; that least cost is the lower bound that proves it.

The routes of a mix are those that need no more than its family: cut2 = l (`DEVICE_EDGE`), cut1 = cut2 (`DEVICE_CLOUD`), or
all pairs (`ALL_THREE`); each with the device alone, if it is free. With a `CodecSearch` the routes are its ways, so a pair of
cuts may be in a mix with several codecs.

A mix is predicted to take w = max F_r + (N - 1) P, where the maximum leaves out the device alone (docs/planner.md). If the
best single route of the family takes less, the mix is that route.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import product
from operator import mul
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from bus.routes.shares import MAX_PIVOTS, TOLERANCE, ShareProgram
from bus.values import BITS_PER_BYTE, Codec, Objective, StationSeconds
from planner.search.codec_search import CodecSearch
from planner.search.cost import NO_OVERHEADS, RAW, Codecs, Overheads
from planner.search.cut_search import CutSearch
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE, family_of

_PIPELINED: Final = Objective.PIPELINED
_FAMILIES: Final = (DEVICE, DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE)
_NOTHING: Final = [0.0, 0.0, 0.0, 0.0]
_INFINITY: Final = float("inf")


_PAIR_BYTES: Final = 320  # upper bound of the memory for each pair of cuts


def route_search_bytes(layers: int) -> int:
    """An upper bound of the memory that a prepared search holds, beside that of its search for single routes.

    With codecs, the measured codecs count as layers: each may be one more crossing.
    """
    return (layers + 1) * (layers + 2) // 2 * _PAIR_BYTES + 20_000


class Way(NamedTuple):
    """The cuts of a route and the codecs of its crossings."""

    cut1: int
    cut2: int
    codecs: Codecs = RAW


class MixedRoute(NamedTuple):
    """A route of a mix."""

    cut1: int
    cut2: int
    share: float
    codecs: Codecs = RAW


class Mix(NamedTuple):
    """The best mix of routes of a family, at given bandwidths."""

    delay_s: float  # w: the predicted delay
    objective_s: float  # the least that shares reach; at most the pipelined delay of each route
    routes: tuple[MixedRoute, ...]  # by falling share
    bound_s: float  # no mix of this family takes less, at these grants or at smaller ones
    prices: StationSeconds  # y_k: every route has F_r + sum_k y_k s_k(r) >= objective_s (1 - gap)
    gap: float  # relative; more than rounding errors only if the shares are not optimal


class RouteSearch:
    """A prepared search for mixes, beside the search for single routes of the same model and platforms."""

    __slots__ = ("_tables", "search")

    def __init__(self, search: CutSearch | CodecSearch) -> None:
        self.search = search
        self._tables: dict[int, _Table] = {}

    def best(
        self,
        family: int,
        link1_bps: float,
        link2_bps: float,
        samples: int,
        input_bytes: int | None = None,
        device_free: bool = True,
        overheads: Overheads = NO_OVERHEADS,
        alone: bool = True,
    ) -> Mix | None:
        """The mix of a family with the least objective, or None if the family has no allowed cuts.

        If `device_free` is False, only routes with cut1 = 0 are used. `alone`: whether the device may compute whole samples.
        `DEVICE_EDGE` ignores `link2_bps`.
        """
        search = self.search
        single = search.best(family, link1_bps, link2_bps, samples, _PIPELINED, input_bytes, device_free, overheads)
        if family == DEVICE or single is None or not single[0] < _INFINITY:
            return None
        table = self._tables.get(family)
        if table is None:
            table = self._tables[family] = _Table(search, family)
        links = link1_bps, 1.0 if family == DEVICE_EDGE else link2_bps
        more_s = _NOTHING
        if overheads is not NO_OVERHEADS:
            more_s = [overheads.total_s(one, samples, _PIPELINED) for one in _FAMILIES]
        device_s = search.device_s(samples, _PIPELINED, overheads) if alone and device_free else None
        delay_s, *way = single
        first = Way(*way)
        pricing = _Pricing(table, links, input_bytes, more_s, device_free, device_s is not None)
        # The program begins with the better of two single routes, which loses the fewest digits.
        best = first if device_s is None or delay_s <= device_s else Way(search.costs.layers, search.costs.layers)
        found = _solved(pricing, best, samples)
        only = MixedRoute(first.cut1, first.cut2, 1.0, first.codecs)
        if found.delay_s < delay_s and found.routes != (only,):
            return found
        return found._replace(delay_s=delay_s, routes=(only,))


def _solved(pricing: _Pricing, first: Way, samples: int) -> Mix:
    """The optimal mix, beginning with all samples on one route."""
    ways, (fill, stations) = [first], pricing.times(first)
    fill_s, stations_s = [fill], [stations]
    program = ShareProgram(0, fill, stations, samples)
    least_s = 0.0
    while program.pivots < MAX_PIVOTS:
        station = program.negative_price()
        if station is not None:
            program.release(station)
            continue
        least_s, way = pricing.least(program.prices)
        if least_s >= program.value_s * (1.0 - TOLERANCE):
            break
        fill, stations = pricing.times(way)
        program.enter(len(ways), fill, stations)
        ways.append(way)
        fill_s.append(fill)
        stations_s.append(stations)
    used = sorted([(-share, ways[label], label) for label, share in program.shares])
    shares = [-share for share, _, _ in used]
    slowest_s = max(
        [sum(map(mul, shares, times)) for times in zip(*[stations_s[label] for _, _, label in used], strict=True)]
    )
    rest_s = (samples - 1) * slowest_s
    objective_s = sum([-share * fill_s[label] for share, _, label in used]) + rest_s
    through = [fill_s[label] for _, way, label in used if way.cut1 < pricing.layers]
    return Mix(
        max(through) + rest_s if through else _INFINITY,
        objective_s,
        tuple([MixedRoute(way.cut1, way.cut2, -share, way.codecs) for share, way, _ in used]),
        pricing.least_delay_s(objective_s, samples),
        program.proof,
        max(0.0, 1.0 - least_s / objective_s) if objective_s else 0.0,
    )


class _Pricing:
    """The routes of a family at given bandwidths, inputs and overheads."""

    __slots__ = (
        "_back_s",
        "_costs",
        "_count",
        "_input_bytes",
        "_links",
        "_more_s",
        "_per_byte",
        "_table",
        "alone",
        "layers",
    )

    def __init__(
        self,
        table: _Table,
        links: tuple[float, float],
        input_bytes: int | None,
        more_s: Sequence[float],
        device_free: bool,
        alone: bool,
    ) -> None:
        self._table, self._costs, self._links, self._input_bytes = table, table.costs, links, input_bytes
        self.layers = layers = table.costs.layers
        self._per_byte = x1, x2 = BITS_PER_BYTE / links[0], BITS_PER_BYTE / links[1]
        result_bytes = table.costs.cut_bytes[layers]
        self._back_s = result_bytes * x1, result_bytes * x2
        self._more_s = more_s  # latencies and overheads by family
        self.alone = Way(layers, layers) if alone else None
        self._count = len(table.ways) if device_free else table.uncut
        table.use_input(input_bytes)

    def times(self, way: Way) -> tuple[float, StationSeconds]:
        """The fill and the station times of a route."""
        cut1, cut2, codecs = way
        stations = self._costs.sample_parts(cut1, cut2, *self._links, self._input_bytes, codecs)
        return sum(stations) + self._more_s[family_of(cut1, cut2, self.layers)], stations

    def least_delay_s(self, objective_s: float, samples: int) -> float:
        """A lower bound of w at these or smaller grants.

        It is the least objective there, without what the device alone adds to this and not to w: its share of its fill, which
        is at most P and its overheads. As w is at least (N - 1) P, it is at least (1 - 1/N) times the rest.
        """
        if self.alone is None:
            return objective_s
        return (objective_s - self._more_s[DEVICE]) * (1.0 - 1.0 / samples)

    def least(self, prices: Sequence[float]) -> tuple[float, Way]:
        """The route with the least F_r + sum_k y_k s_k(r), and this cost."""
        y1, y2, y3, y4, y5, y6, y7 = prices
        (x1, x2), (back1_s, back2_s), more_s = self._per_byte, self._back_s, self._more_s
        back1_s *= 1.0 + y7
        back_s = back1_s + (1.0 + y6) * back2_s
        cost_s, way = self._table.least(
            (
                1.0 + y1,
                (1.0 + y2) * x1,
                1.0 + y3,
                (1.0 + y4) * x2,
                1.0 + y5,
                back1_s + more_s[DEVICE_EDGE],
                back_s + more_s[DEVICE_CLOUD],
                back_s + more_s[ALL_THREE],
            ),
            self._count,
        )
        if self.alone is not None:
            alone_s = (1.0 + y1) * self._costs.device[self.layers] + more_s[DEVICE]
            if alone_s < cost_s:
                return alone_s, self.alone
        return cost_s, way


class _Table:
    """The routes of a family in order of cuts and codecs, with their terms that do not depend on bandwidths and prices.

    Terms (with codecs): seconds of the device, bytes on link 1, seconds of the edge, bytes on link 2, seconds of the cloud,
    and a 1 for the family of the pair of cuts.
    """

    __slots__ = ("_cost_s", "_input_bytes", "_own", "_terms", "_weights", "_weights_view", "costs", "uncut", "ways")

    def __init__(self, search: CutSearch | CodecSearch, family: int) -> None:
        self.costs = search.costs
        families = (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE) if family == ALL_THREE else (family,)
        self.ways, self._terms = (
            _coded_terms(search, families) if isinstance(search, CodecSearch) else _raw_terms(search, families)
        )
        self.uncut = sum(way.cut1 == 0 for way in self.ways)
        self._own = self._terms[:4, : self.uncut].copy()
        self._input_bytes: int | None = None  # that the terms are for; None: the model's own
        self._weights = array("d", bytes(8 * len(self._terms)))
        self._weights_view = np.frombuffer(self._weights)
        self._cost_s = np.empty(len(self.ways))

    def use_input(self, input_bytes: int | None) -> None:
        """Use inputs of this size. Inputs of another size than the model's own are sent raw."""
        if input_bytes == self.costs.cut_bytes[0]:
            input_bytes = None
        if input_bytes == self._input_bytes:
            return
        self._input_bytes = input_bytes
        self._terms[:4, : self.uncut] = self._own
        if input_bytes is None:
            return
        for at, way in enumerate(self.ways[: self.uncut]):
            size = input_bytes if way.codecs[0] is Codec.RAW else _INFINITY
            self._terms[1, at] = size
            if way.cut2 == 0:
                self._terms[3, at] = size

    def least(self, weights: Sequence[float], count: int) -> tuple[float, Way]:
        """The way with the least weighted sum of terms, of the first `count` ones, and this sum."""
        own = self._weights
        own[0], own[1], own[2], own[3], own[4], own[5], own[6], own[7] = weights
        cost_s = self._cost_s[:count]
        self._weights_view.dot(self._terms[:, :count], out=cost_s)
        at = int(cost_s.argmin())
        return cost_s.item(at), self.ways[at]


_Terms = npt.NDArray[np.float64]


def _raw_terms(search: CutSearch, families: Sequence[int]) -> tuple[list[Way], _Terms]:
    """All pairs of cuts of these families in order, and their terms."""
    costs, rows = search.costs, []
    cuts = [cut for cut in range(costs.layers + 1) if cut not in search.forbidden]
    for cut1, cut2 in product(cuts[:-1], cuts):
        kind = family_of(cut1, cut2, costs.layers)
        if cut1 > cut2 or kind not in families:
            continue
        parts = costs.sample_parts(cut1, cut2, BITS_PER_BYTE, BITS_PER_BYTE)  # 1 byte a second
        if sum(parts) < _INFINITY:
            rows.append((Way(cut1, cut2), (*parts[:5], *(float(kind == one) for one in _FAMILIES[1:]))))
    return [way for way, _ in rows], np.ascontiguousarray(np.array([terms for _, terms in rows]).T)


def _coded_terms(search: CodecSearch, families: Sequence[int]) -> tuple[list[Way], _Terms]:
    """All ways of these families in order, and their terms."""
    ways: list[Way] = []
    columns = []
    for family in families:
        found = search.ways(family)
        if found is None:
            continue
        ways += [
            Way(cut1, cut2, (codec1, codec2))
            for (cut1, codec1), (cut2, codec2) in zip(found.first, found.second, strict=True)
        ]
        kinds = [np.full(len(found.first), float(family == one)) for one in _FAMILIES[1:]]
        columns.append(np.array([found.device_s, found.bytes1, found.edge_s, found.bytes2, found.cloud_s, *kinds]))
    order = sorted(range(len(ways)), key=ways.__getitem__)
    return [ways[at] for at in order], np.ascontiguousarray(np.concatenate(columns, axis=1)[:, order])
