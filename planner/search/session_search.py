"""The search for the placement of a session: an open-ended task whose samples arrive at a rate.

A session has no end, so it cannot hold a slot or a whole link. It books a share of each station instead: load on the device
and on the edge (in units of 1/1024 of the time of one slot), and bandwidth. `least` compares all pairs of cuts of all sites
(the device alone, and every edge) at once:

* A station's period is the shortest time between two samples that it can sustain with what is free. For a computing station
  it is its time of a sample, or that time over the free load if this is longer; for a link it is 1.25 times the bytes over
  the free bandwidth. The period of a placement is the longest of them. It sustains the rate if its period is at most 1/rate.
* Of the placements that sustain the rate, the one with the least sum of station times, latencies and overheads wins. If the
  client states a latency target and none meets it, the search is repeated with all free bandwidth.
* If no placement sustains the rate, the one with the shortest period wins, and the session gets the rate that it sustains.
* The grant on a link is 4 times what the rate needs, or the link's spare bandwidth if that is more, but at most what is free.
  Without the spare bandwidth, a session of one sample a second would spend a quarter of a second on an idle link.

A node that computes for others too needs longer for a sample: its time counts 1/(1 - share of the others).

With codecs every pair of cuts counts once with each pair of codecs that the session allows (`planner.search.codec_search`):
encoding and decoding join the computing stations, and encoded bytes cross the links. The grant stays 4 times what raw
activations need, so that codecs shorten the delay at the bandwidth that the session gets anyway.

Ties: the family wins, then the edge by name, cut1, and cut2, as in `planner.search.algorithm1`, then the codecs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from bus.values import BITS_PER_BYTE, Placement
from planner.search.codec_search import CodecSearch
from planner.search.cost import NO_OVERHEADS, RAW, Codecs, Costs, Overheads, StationTimes
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE, family_of
from planner.search.ledger.reservation import LOAD_UNITS
from planner.search.request import EVERY_FAMILY

GRANT: Final = 4.0
"""The grant on a link as a multiple of what the rate needs, where that much is free."""
LEAST_GRANT: Final = 1.25
"""The least grant on a link that sustains a rate, as a multiple of what the rate needs."""

_NEVER: Final = float("inf")
_Times = npt.NDArray[np.float64]
_Whole = npt.NDArray[np.int64]


class Site(NamedTuple):
    """One edge, or the device alone, with what is free there for a session."""

    edge: str | None  # None: the device alone
    costs: Costs  # without the load of others
    forbidden: Collection[int] = ()  # positions at which the model must not be cut
    overheads: Overheads = NO_OVERHEADS
    link1_bps: int = 0  # free
    link2_bps: int = 0  # free
    link1_spare_bps: int = 0  # that a session may get beyond 4 times its need
    link2_spare_bps: int = 0
    edge_units: int = 0  # free load
    edge_share: float = 0.0  # share of the edge's time that others have booked
    coded: CodecSearch | None = None  # the codecs that the session may use; None: none


class Wish(NamedTuple):
    """What a session asks for, and what is free on its device."""

    rate_hz: float
    latency_s: float | None  # target; None: as short as possible
    input_bytes: int | None  # G(0); None: the model's own
    families: Collection[int] = EVERY_FAMILY
    device_computes: bool = True  # False: only cut1 = 0
    device_units: int = 0  # free load
    device_share: float = 0.0  # share of the device's time that others have booked


class SessionChoice(NamedTuple):
    """A placement of a session: what it books, and the times of one sample."""

    family: int
    edge: str | None
    cut1: int
    cut2: int
    link1_bps: int
    link2_bps: int
    rate_hz: float  # that it sustains; at most the rate that was asked for
    delay_s: float  # of one sample
    period_s: float  # of the slowest station
    device_units: int  # load
    edge_units: int
    stations_s: StationTimes
    codecs: Codecs = RAW


class SampleTimes(NamedTuple):
    """What a placement gives to a session."""

    delay_s: float
    period_s: float  # of the slowest station


def held(site: Site, wish: Wish, placement: Placement) -> SampleTimes:
    """What a placement that the session holds on a site gives; the site's load is what is free without the session."""
    link1_bps, link2_bps = placement.link1_bps or 1, placement.link2_bps or 1
    cut1, cut2 = placement.cut1, placement.cut2
    codecs = RAW
    if placement.routes is not None and site.coded is not None:
        route = placement.routes[0]
        allowed = site.coded.codecs_at(cut1, cut2)  # not those whose measurement is gone
        codecs = (route.codec1, route.codec2) if (route.codec1, route.codec2) in allowed else RAW
    one = site.costs.sample_parts(cut1, cut2, link1_bps, link2_bps, wish.input_bytes, codecs)
    device_s, edge_s = one.s1 / (1.0 - wish.device_share), one.s3 / (1.0 - site.edge_share)
    family = family_of(cut1, cut2, site.costs.layers)
    overheads = site.overheads
    more_s = max(0.0, overheads.latency_s(family) + overheads.sample_s[family])
    return SampleTimes(
        device_s + one.s2 + edge_s + one.s4 + one.s5 + one.s6b + one.s6a + more_s,
        max(
            device_s,
            edge_s,
            one.s5,
            LEAST_GRANT * max(one.s2, one.s4, one.s6b, one.s6a),
            one.s1 * LOAD_UNITS / max(wish.device_units, 1),
            one.s3 * LOAD_UNITS / max(site.edge_units, 1),
        ),
    )


def least(sites: Iterable[Site], wish: Wish) -> SessionChoice | None:
    """The best placement of a session, or None if no placement is possible."""
    tables = [table for site in sites if (table := _Table.of(site, wish)) is not None]
    sustaining = [table for table in tables if bool(table.sustains.any())]
    if not sustaining:
        return min((table.fastest() for table in tables), key=_slowness, default=None)
    best = min((table.shortest() for table in sustaining), key=_shortness)
    if wish.latency_s is not None and best.delay_s > wish.latency_s:
        wider = min((table.shortest(wide=True) for table in sustaining), key=_shortness)
        if wider.delay_s <= wish.latency_s:
            return wider
    return best


def _shortness(choice: SessionChoice) -> tuple[float, int, str, int, int]:
    return choice.delay_s, choice.family, choice.edge or "", choice.cut1, choice.cut2


def _slowness(choice: SessionChoice) -> tuple[float, float, int, str, int, int]:
    return choice.period_s, *_shortness(choice)


class _Pairs(NamedTuple):
    """The pairs of cuts of one site, ordered by family, cut1 and cut2, and what a sample takes there on idle nodes."""

    family: _Whole
    cut1: _Whole
    cut2: _Whole
    device_s: _Times
    edge_s: _Times
    cloud_s: _Times
    bytes1: _Times  # that cross link 1, if it is used
    bytes2: _Times
    raw1: _Times  # the same without codecs
    raw2: _Times
    codecs: Sequence[Codecs] | None = None  # of each pair; None: all raw


class _Table:
    """All pairs of cuts of one site with their terms that do not depend on the grants."""

    def __init__(self, site: Site, wish: Wish, pairs: _Pairs) -> None:
        costs = site.costs
        layers = costs.layers
        self.site, self.wish = site, wish
        family, c1, c2, device, edge, self.cloud_s, bytes1, bytes2, raw1, raw2, self.codecs = pairs
        self.family, self.cut1, self.cut2 = family, c1, c2
        self.alone, self.uses_cloud = c1 == layers, c2 < layers
        result = np.full_like(device, costs.cut_bytes[layers])
        self.up1 = np.where(self.alone, 0.0, BITS_PER_BYTE * bytes1)
        self.up2 = np.where(self.uses_cloud, BITS_PER_BYTE * bytes2, 0.0)
        self.down1 = np.where(self.alone, 0.0, BITS_PER_BYTE * result)
        self.down2 = np.where(self.uses_cloud, BITS_PER_BYTE * result, 0.0)
        self.need1 = np.where(self.alone, 0.0, BITS_PER_BYTE * np.maximum(raw1, result))
        self.need2 = np.where(self.uses_cloud, BITS_PER_BYTE * np.maximum(raw2, result), 0.0)
        self.device_need, self.edge_need = device * LOAD_UNITS, edge * LOAD_UNITS  # load units for one sample a second
        self.device_s = device / (1.0 - wish.device_share)
        self.edge_s = edge / (1.0 - site.edge_share)
        self.period_s = np.maximum.reduce(
            [
                self.device_s,
                self.edge_s,
                self.cloud_s,
                _over(self.device_need, wish.device_units, c1 > 0),
                _over(self.edge_need, site.edge_units, c1 < c2),
                _over(LEAST_GRANT * np.maximum(self.up1, self.down1), site.link1_bps, ~self.alone),
                _over(LEAST_GRANT * np.maximum(self.up2, self.down2), site.link2_bps, self.uses_cloud),
            ]
        )
        self.sustains = self.period_s * wish.rate_hz <= 1.0
        more_s = [
            max(0.0, site.overheads.latency_s(family) + site.overheads.sample_s[family])
            for family in (DEVICE, DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE)
        ]
        self.more_s = np.array(more_s)[family]

    @classmethod
    def of(cls, site: Site, wish: Wish) -> _Table | None:
        """The table of a site; None if it offers no pair of cuts."""
        costs = site.costs
        layers = costs.layers
        positions = [cut for cut in range(layers + 1) if cut not in site.forbidden]
        cuts: list[tuple[int, int, int]] = []
        if site.edge is None:
            if DEVICE in wish.families and wish.device_computes:
                cuts = [(DEVICE, layers, layers)]
        else:
            firsts = [cut for cut in positions if cut < layers and (wish.device_computes or cut == 0)]
            if DEVICE_EDGE in wish.families and costs.edge is not None:
                cuts += [(DEVICE_EDGE, cut, layers) for cut in firsts]
            if DEVICE_CLOUD in wish.families and costs.cloud is not None:
                cuts += [(DEVICE_CLOUD, cut, cut) for cut in firsts]
            if ALL_THREE in wish.families and costs.edge is not None and costs.cloud is not None:
                cuts += [(ALL_THREE, one, two) for one in firsts for two in positions if one < two < layers]
        if site.coded is not None and site.edge is not None:
            pairs = _coded_pairs(site.coded, wish)
        else:
            pairs = _raw_pairs(costs, wish, cuts) if cuts else None
        if pairs is None:
            return None
        table = cls(site, wish, pairs)
        return table if bool((table.period_s < _NEVER).any()) else None

    def shortest(self, *, wide: bool = False) -> SessionChoice:
        """The pair with the least delay among those that sustain the rate; `wide`: with all bandwidth that is free."""
        rate = np.full_like(self.period_s, self.wish.rate_hz)
        stations = self._stations(rate, wide=wide)
        delay = np.where(self.sustains, self._delay_s(stations), _NEVER)
        return self._choice(int(delay.argmin()), rate, stations)

    def fastest(self) -> SessionChoice:
        """The pair with the shortest period."""
        rate = np.minimum(self.wish.rate_hz, 1.0 / np.maximum(self.period_s, 1e-300))
        stations = self._stations(rate)
        delay = np.where(self.period_s == self.period_s.min(), self._delay_s(stations), _NEVER)
        return self._choice(int(delay.argmin()), rate, stations)

    def _stations(self, rate: _Times, *, wide: bool = False) -> tuple[list[_Times], _Whole, _Whole]:
        """The seven station times of every pair, and the grants on both links."""
        site = self.site
        spare1, spare2 = (site.link1_bps, site.link2_bps) if wide else (site.link1_spare_bps, site.link2_spare_bps)
        wanted1, wanted2 = GRANT * rate * self.need1, GRANT * rate * self.need2
        granted1 = _granted(wanted1, spare1, site.link1_bps, ~self.alone)
        granted2 = _granted(wanted2, spare2, site.link2_bps, self.uses_cloud)
        per1, per2 = np.maximum(granted1, 1), np.maximum(granted2, 1)
        times = [
            self.device_s,
            self.up1 / per1,
            self.edge_s,
            self.up2 / per2,
            self.cloud_s,
            self.down2 / per2,
            self.down1 / per1,
        ]
        return times, granted1, granted2

    def _delay_s(self, stations: tuple[list[_Times], _Whole, _Whole]) -> _Times:
        total: _Times = sum(stations[0][1:], stations[0][0]) + self.more_s
        return total

    def _choice(self, at: int, rate: _Times, stations: tuple[list[_Times], _Whole, _Whole]) -> SessionChoice:
        times, granted1, granted2 = stations
        rate_hz = float(rate[at])
        family, cut1, cut2 = int(self.family[at]), int(self.cut1[at]), int(self.cut2[at])
        s1, s2, s3, s4, s5, s6b, s6a = (float(column[at]) for column in times)
        return SessionChoice(
            family=family,
            edge=self.site.edge,
            cut1=cut1,
            cut2=cut2,
            link1_bps=int(granted1[at]),
            link2_bps=int(granted2[at]),
            rate_hz=rate_hz,
            delay_s=float(self._delay_s(stations)[at]),
            period_s=float(self.period_s[at]),
            device_units=_units(rate_hz * float(self.device_need[at]), self.wish.device_units, cut1 > 0),
            edge_units=_units(rate_hz * float(self.edge_need[at]), self.site.edge_units, cut1 < cut2),
            stations_s=(s1, s2, s3, s4, s5, s6b, s6a),
            codecs=RAW if self.codecs is None else self.codecs[at],
        )


def _raw_pairs(costs: Costs, wish: Wish, cuts: Sequence[tuple[int, int, int]]) -> _Pairs:
    """The given families and cuts without codecs."""
    family, c1, c2 = (np.array(column) for column in zip(*cuts, strict=True))
    size = np.array(costs.cut_bytes, dtype=np.float64)
    size[0] = costs.cut_bytes[0] if wish.input_bytes is None else wish.input_bytes
    return _Pairs(
        family,
        c1,
        c2,
        np.array(costs.device)[c1],
        _spent(costs.edge, costs.edge_overhead_s, c1, c2),
        _spent(costs.cloud, costs.cloud_overhead_s, c2, np.full_like(c2, costs.layers)),
        size[c1],
        size[c2],
        size[c1],
        size[c2],
    )


def _coded_pairs(search: CodecSearch, wish: Wish) -> _Pairs | None:
    """All cuts and codecs through an edge that the session allows; None if there are none.

    Inputs of another size than the model's cross raw, because the measured sizes are those of other inputs.
    """
    size = np.array(search.costs.cut_bytes, dtype=np.float64)
    own_bytes = None if wish.input_bytes == size[0] else wish.input_bytes
    if own_bytes is not None:
        size[0] = own_bytes
    found = []
    for family in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE):
        ways = search.ways(family) if family in wish.families else None
        if ways is None:
            continue
        used = np.arange(len(ways.first) if wish.device_computes else ways.uncut)
        bytes1, bytes2 = ways.bytes1, ways.bytes2
        if own_bytes is not None:
            raw = ways.raw_inputs
            used = used[(used < raw) | (used >= ways.uncut)]
            bytes1 = np.concatenate([np.full(raw, float(own_bytes)), bytes1[raw:]])
            if family == DEVICE_CLOUD:
                bytes2 = bytes1
        first, second = ([crossings[at] for at in used.tolist()] for crossings in (ways.first, ways.second))
        if first:
            cuts1, cuts2 = (np.array([cut for cut, _ in crossings]) for crossings in (first, second))
            found.append(
                _Pairs(
                    np.full(len(used), family),
                    cuts1,
                    cuts2,
                    ways.device_s[used],
                    ways.edge_s[used],
                    ways.cloud_s[used],
                    bytes1[used],
                    bytes2[used],
                    size[cuts1],
                    size[cuts2],
                    [(codec1, codec2) for (_, codec1), (_, codec2) in zip(first, second, strict=True)],
                )
            )
    if not found:
        return None
    columns = [np.concatenate(column) for column in zip(*(pairs[:-1] for pairs in found), strict=True)]
    return _Pairs._make((*columns, [pair for pairs in found for pair in pairs.codecs or ()]))


def _spent(row: tuple[float, ...] | None, overhead_s: float, first: _Whole, last: _Whole) -> _Times:
    """The time that a platform needs for the layers between two cuts; 0 if there are none."""
    if row is None:
        return np.zeros(len(first))
    times = np.array(row)
    return np.where(first < last, times[last] - times[first] + overhead_s, 0.0)


def _over(need: _Times, free: int, used: npt.NDArray[np.bool_]) -> _Times:
    """The period of a station that is free to this extent: 0 where it is not used, infinite where nothing is free."""
    if free < 1:
        return np.where(used, _NEVER, 0.0)
    return np.where(used, need / free, 0.0)


def _granted(wanted_bps: _Times, spare_bps: int, free_bps: int, used: npt.NDArray[np.bool_]) -> _Whole:
    """The grants on a link: whole bits per second, at least 1 where the link is used."""
    granted = np.minimum(np.maximum(np.ceil(wanted_bps), float(max(spare_bps, 1))), float(free_bps))
    return np.where(used, granted, 0.0).astype(np.int64)


def _units(need: float, free: int, used: bool) -> int:
    """The load that is booked for a need: whole units, at least one if the station is used."""
    return min(max(1, int(np.ceil(need))), free) if used else 0
