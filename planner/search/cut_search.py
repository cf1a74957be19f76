"""An exact search for the best two cuts at given bandwidths, without trying all pairs.

**Sequential.** Per sample, the sum of (1)-(6) splits into a term of cut1 and a term of cut2. Let x1 = 8/b1 and x2 = 8/b2 be
the seconds per byte, and F_d, F_e, F_c the cumulative times of the platforms:

* device+edge (cut2 = l):       F_d(c) - F_e(c) + F_e(l) + G(c) x1           one line in x1 per cut
* device+cloud (cut1 = cut2):   F_d(c) + F_c(l) - F_c(c) + G(c) (x1 + x2)    one line in x1 + x2 per cut
* all three:                    [F_d(c1) - F_e(c1) + G(c1) x1] + [F_e(c2) - F_c(c2) + F_c(l) + G(c2) x2], c1 < c2

F_d(c) contains the device's overhead of a sample if c > 0; F_e(l) and F_c(l) contain those of edge and cloud. Latencies and
the overhead of a task are the same for all cuts of a family (`planner.search.cost`), so they are added at the end.

The least of a set of lines lies on their lower envelope. It is computed once per model and triple of platforms, and it is
short (5-10 lines for 92 random layers). For all three tiers, the separate best c1 and c2 are the answer if c1 < c2.
Otherwise the search uses prefix minima over the undominated cuts. A c1 is dominated if an earlier c1 has no greater intercept
and no greater size, because the earlier one is at least as good at any bandwidth *and* leaves more choices for c2. A c2 is
dominated if a later one is better in this sense. The search does not assume that layers are slower on lower tiers.

**Pipelined.** The delay adds (N - 1) times the slowest station. The terms that do not depend on bandwidth (the sum, and the
slowest computing station) are prepared for each cut or pair. The rest is one numpy pass over all pairs (4,186 at 92 layers),
or a loop over the undominated cuts.

Cut 0 is handled separately, because a task may bring its own input size G(0).

Ties: the smaller cut1 wins, then the smaller cut2. Sums are rounded differently than in `Costs.delay_s`, so two cuts whose
delays differ by less than about 1e-15 of their value may be confused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bus.values import BITS_PER_BYTE, Objective
from planner.search.cost import NO_OVERHEADS, Costs, Overheads, PlatformRow
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE, family_of

Found = tuple[float, int, int]
"""Delay in seconds, cut1, cut2."""

_INFINITY: Final = float("inf")
_SEQUENTIAL: Final = Objective.SEQUENTIAL
_SLACK: Final = 1e-9  # relative tolerance: lines this close to the envelope stay on it, so that rounding loses no tie


_LINE_BYTES: Final = 700  # upper bound of the memory per layer for the lines of a search
_PAIR_BYTES: Final = 62  # memory per pair of cuts in a pipelined search


def search_bytes(layers: int, objective: Objective) -> int:
    """An upper bound of the memory that a prepared search for this many layers holds."""
    pairs = layers * (layers + 1) // 2 if objective is not _SEQUENTIAL else 0
    return layers * _LINE_BYTES + pairs * _PAIR_BYTES + 5_000


class CutSearch:
    """A prepared search for one model on one device, edge and cloud.

    `allowed1` and `allowed2` restrict cut1 and cut2 to some positions (default: all). Positions that a profile forbids are
    never used. Positions 0 and l do not split the model, but they can be disallowed too.
    """

    __slots__ = (
        "_cloud_only",
        "_device_s",
        "_edge_envelope",
        "_edge_lines",
        "_edge_only",
        "_first",
        "_first_front",
        "_pairs",
        "_positions1",
        "_positions2",
        "_relay_envelope",
        "_relay_lines",
        "_result",
        "_second",
        "_second_from0",
        "_second_front",
        "_zero",
        "beside",
        "costs",
        "forbidden",
    )

    def __init__(
        self,
        device: PlatformRow,
        edge: PlatformRow | None,
        cloud: PlatformRow | None,
        allowed1: Iterable[int] | None = None,
        allowed2: Iterable[int] | None = None,
    ) -> None:
        self.costs = costs = Costs(device, edge, cloud)
        layers, size = costs.layers, costs.cut_bytes
        self.forbidden = forbidden = device.forbidden.union(
            *(row.forbidden for row in (edge, cloud) if row is not None)
        )
        ones = set(range(layers + 1) if allowed1 is None else allowed1) - forbidden
        twos = set(range(layers + 1) if allowed2 is None else allowed2) - forbidden
        f_d, f_e, f_c = costs.device, costs.edge, costs.cloud
        self._result = size[layers]
        self._zero = 0 in ones
        self._device_s = f_d[layers] if layers in ones and layers in twos else None
        # Position 0 is not in the lists below, because its size depends on the task.
        edge_s, cloud_s = costs.edge_overhead_s, costs.cloud_overhead_s
        self._edge_only = f_e[layers] + edge_s if f_e is not None and self._zero and layers in twos else None
        self._cloud_only = f_c[layers] + cloud_s if f_c is not None and self._zero and 0 in twos else None
        inside = range(1, layers)
        self._edge_lines: list[_Line] = []
        self._relay_lines: list[_Line] = []
        self._edge_envelope: list[_Line] = []
        self._relay_envelope: list[_Line] = []
        if f_e is not None and layers in twos:
            last = f_e[layers] + edge_s
            lines = [(f_d[c] - f_e[c] + last, size[c], c, max(f_d[c], last - f_e[c])) for c in inside if c in ones]
            self._edge_lines, self._edge_envelope = _undominated(lines), _envelope(lines)
        if f_c is not None:
            last = f_c[layers] + cloud_s
            both = ones & twos
            lines = [(f_d[c] + (last - f_c[c]), size[c], c, max(f_d[c], last - f_c[c])) for c in inside if c in both]
            self._relay_lines, self._relay_envelope = _undominated(lines), _envelope(lines)
        first: list[_Line] = []
        second: list[_Line] = []
        if f_e is not None and f_c is not None:
            last = f_c[layers] + cloud_s
            second = [(f_e[c] + (last - f_c[c]), size[c], c, 0.0) for c in inside if c in twos]
            first = [(f_d[c] - f_e[c], size[c], c, 0.0) for c in inside if c in ones and second and c < second[-1][2]]
        behind = [line for line in second if first and line[2] > first[0][2]]
        self._positions1 = ([0] if self._zero else []) + [line[2] for line in first]
        self._positions2 = [line[2] for line in second]
        self._second_from0 = _envelope(second)
        self._first = _envelope(first)
        self._second = _envelope(behind)
        self._first_front = _front(first)
        self._second_front = _front(behind[::-1], strict=True)[::-1]
        self._pairs: _Pairs | None = None
        self.beside: Any = None  # what another search has prepared from this one (`planner.search.route_search`)

    def device_s(self, samples: int, objective: Objective, overheads: Overheads = NO_OVERHEADS) -> float | None:
        """w_0, the delay of the whole model on the device; None if not allowed. Objectives differ only in rounding."""
        one = self._device_s
        if one is None:
            return None
        alone = samples * one if objective is _SEQUENTIAL else one + (samples - 1) * one
        return alone if overheads is NO_OVERHEADS else alone + overheads.total_s(DEVICE, samples, objective)

    def best(
        self,
        family: int,
        link1_bps: float,
        link2_bps: float,
        samples: int,
        objective: Objective,
        input_bytes: int | None = None,
        device_free: bool = True,
        overheads: Overheads = NO_OVERHEADS,
    ) -> Found | None:
        """The least delay of a family and its cuts, or None if the family has no allowed cuts.

        If `device_free` is False, only cut1 = 0 is tried. `DEVICE_EDGE` ignores `link2_bps`.
        """
        if family == DEVICE:
            alone = self.device_s(samples, objective, overheads)
            return None if alone is None or not device_free else (alone, self.costs.layers, self.costs.layers)
        if objective is not _SEQUENTIAL:
            cuts = self._pipelined(family, link1_bps, link2_bps, samples, input_bytes, device_free)
            if cuts is None:
                return None
            cut1, cut2 = cuts
            delay = self.costs.delay_s(cut1, cut2, link1_bps, link2_bps, samples, objective, input_bytes, overheads)
            return delay, cut1, cut2
        more_s = 0.0 if overheads is NO_OVERHEADS else overheads.total_s(family, samples, objective)
        # The planner's hottest code, so it makes few calls. The delays are the same sums as in `Costs.delay_s`.
        costs = self.costs
        layers, sizes, device = costs.layers, costs.cut_bytes, costs.device
        g0 = sizes[0] if input_bytes is None else input_bytes
        x1 = BITS_PER_BYTE / link1_bps
        if family == DEVICE_EDGE:
            edge, start = costs.edge, self._edge_only
            best, cut = (_INFINITY, -1) if start is None else (start + g0 * x1, 0)
            if device_free:
                for a, g, c, _ in self._edge_envelope:
                    value = a + g * x1
                    if value < best:
                        best, cut = value, c
            if cut < 0 or edge is None:
                return None
            s2 = (sizes[cut] if cut else g0) * x1
            s3 = edge[layers] - edge[cut] + costs.edge_overhead_s
            return samples * (device[cut] + s2 + s3 + self._result * x1) + more_s, cut, layers
        x2 = BITS_PER_BYTE / link2_bps
        cloud = costs.cloud
        if family == DEVICE_CLOUD:
            x, start = x1 + x2, self._cloud_only
            best, cut = (_INFINITY, -1) if start is None else (start + g0 * x, 0)
            if device_free:
                for a, g, c, _ in self._relay_envelope:
                    value = a + g * x
                    if value < best:
                        best, cut = value, c
            if cut < 0 or cloud is None:
                return None
            size, s3, cut2 = sizes[cut] if cut else g0, 0.0, cut
            s4 = size * x2
        else:
            pair = self._sequential_pair(x1, x2, g0, device_free)
            edge = costs.edge
            if pair is None or edge is None or cloud is None:
                return None
            cut, cut2 = pair
            size, s3 = sizes[cut] if cut else g0, edge[cut2] - edge[cut] + costs.edge_overhead_s
            s4 = sizes[cut2] * x2
        s5 = cloud[layers] - cloud[cut2] + costs.cloud_overhead_s
        result = self._result
        return samples * (device[cut] + size * x1 + s3 + s4 + s5 + (result * x2 + result * x1)) + more_s, cut, cut2

    # --- sequential ---

    def _sequential_pair(self, x1: float, x2: float, g0: int, device_free: bool) -> tuple[int, int] | None:
        best, cut1, cut2 = _INFINITY, -1, -1
        if self._zero:
            for a, g, c, _ in self._second_from0:
                value = a + g * x2
                if value < best:
                    best, cut2 = value, c
            if cut2 > 0:
                best, cut1 = best + g0 * x1, 0
        if not device_free or not self._first:
            return None if cut1 < 0 else (cut1, cut2)
        least1 = least2 = _INFINITY
        c1 = c2 = -1
        for a, g, c, _ in self._first:
            value = a + g * x1
            if value < least1:
                least1, c1 = value, c
        for a, g, c, _ in self._second:
            value = a + g * x2
            if value < least2:
                least2, c2 = value, c
        if c1 < c2:
            return (c1, c2) if least1 + least2 < best else (cut1, cut2)
        if least1 + least2 >= best:
            return cut1, cut2
        # The separate minima have c1 >= c2, so take prefix minima of the first term while the second cut moves up.
        front = self._first_front
        index, count, prefix, prefix_at = 0, len(front), _INFINITY, -1
        for a, g, c, _ in self._second_front:
            while index < count and front[index][2] < c:
                first = front[index]
                value = first[0] + first[1] * x1
                if value < prefix:
                    prefix, prefix_at = value, first[2]
                index += 1
            value = prefix + (a + g * x2)
            if value < best:
                best, cut1, cut2 = value, prefix_at, c
        return None if cut1 < 0 else (cut1, cut2)

    # --- pipelined ---

    def _pipelined(
        self, family: int, link1_bps: float, link2_bps: float, samples: int, input_bytes: int | None, device_free: bool
    ) -> tuple[int, int] | None:
        costs = self.costs
        layers = costs.layers
        g0 = costs.cut_bytes[0] if input_bytes is None else input_bytes
        more = samples - 1
        x1 = BITS_PER_BYTE / link1_bps
        if family == ALL_THREE:
            x2 = BITS_PER_BYTE / link2_bps
            if self._pairs is None:
                self._pairs = _Pairs(self)
            return self._pairs.best(x1, x2, g0, self._result, more, device_free)
        if family == DEVICE_EDGE:
            x = slowest = x1
            base = self._result * x1
            start, lines = self._edge_only, self._edge_lines
        else:
            x2 = BITS_PER_BYTE / link2_bps
            x, slowest = x1 + x2, max(x1, x2)
            base = self._result * slowest
            start, lines = self._cloud_only, self._relay_lines
        best, cut = _INFINITY, -1
        if start is not None:
            best, cut = start + g0 * x + more * max(start, g0 * slowest, base), 0
        if device_free:
            for a, g, c, busy in lines:
                crossing = g * slowest
                if busy < crossing:
                    busy = crossing
                value = a + g * x + more * (base if busy < base else busy)
                if value < best:
                    best, cut = value, c
        if cut < 0:
            return None
        return (cut, layers) if family == DEVICE_EDGE else (cut, cut)


_Line = tuple[float, int, int, float]
"""Intercept (s), size (bytes), position, slowest computing station (s)."""


class _Pairs:
    """All allowed pairs 0 <= c1 < c2 < l, ordered by c1 and then c2, as flat arrays with preallocated buffers."""

    __slots__ = ("_busy", "_c1", "_c2", "_g1", "_g2", "_room1", "_room2", "_room3", "_sum", "_zeros")

    def __init__(self, search: CutSearch) -> None:
        costs = search.costs
        f_e, f_c = costs.edge, costs.cloud
        seconds = np.array(search._positions2, dtype=np.intp)
        firsts = np.array(search._positions1, dtype=np.intp)
        if f_e is None or f_c is None:
            seconds = firsts = seconds[:0]
        c1 = np.repeat(firsts, len(seconds))
        c2 = np.tile(seconds, len(firsts))
        size = np.array(costs.cut_bytes, dtype=np.float64)
        device = np.array(costs.device)
        edge = np.array(f_e if f_e is not None else costs.device)
        cloud = np.array(f_c if f_c is not None else costs.device)
        with np.errstate(over="ignore", invalid="ignore"):  # infinite delays are dropped below
            edge_s = edge[c2] - edge[c1] + costs.edge_overhead_s
            cloud_s = cloud[-1] - cloud[c2] + costs.cloud_overhead_s
            total = device[c1] + edge_s + cloud_s
        keep = (c1 < c2) & np.isfinite(total)
        self._c1: npt.NDArray[np.int16] = c1[keep].astype(np.int16)
        self._c2: npt.NDArray[np.int16] = c2[keep].astype(np.int16)
        self._zeros = int(np.count_nonzero(self._c1 == 0))
        self._sum = total[keep]
        self._busy = np.maximum(np.maximum(device[self._c1], edge_s[keep]), cloud_s[keep])
        self._g1 = size[self._c1]
        self._g2 = size[self._c2]
        self._room1, self._room2, self._room3 = (np.empty_like(self._sum) for _ in range(3))

    def best(self, x1: float, x2: float, g0: int, result: int, more: int, device_free: bool) -> tuple[int, int] | None:
        zeros = self._zeros
        count = len(self._c1) if device_free else zeros
        if not count:
            return None
        one, two, busy = self._room1[:count], self._room2[:count], self._room3[:count]
        np.multiply(self._g1[:count], x1, out=one)
        one[:zeros] = g0 * x1
        np.multiply(self._g2[:count], x2, out=two)
        np.maximum(one, two, out=busy)
        np.maximum(busy, self._busy[:count], out=busy)
        np.maximum(busy, result * max(x1, x2), out=busy)
        with np.errstate(over="ignore"):
            np.multiply(busy, more, out=busy)
        np.add(one, two, out=one)
        np.add(one, self._sum[:count], out=one)
        np.add(one, busy, out=one)
        at = int(one.argmin())
        return int(self._c1[at]), int(self._c2[at])


def _front(lines: list[_Line], strict: bool = False) -> list[_Line]:
    """The lines that no earlier line dominates in intercept and size. With `strict`, an equal line does not dominate."""
    kept: list[_Line] = []
    for line in lines:
        for other in kept:
            if other[0] <= line[0] and other[1] <= line[1] and not (strict and other[:2] == line[:2]):
                break
        else:
            kept.append(line)
    return kept


def _undominated(lines: list[_Line]) -> list[_Line]:
    """The lines that no other line dominates in intercept, size and slowest station.

    A line that is worse only in the slowest station can still tie, so it stays if its position is smaller.
    """
    kept: list[_Line] = []
    for line in sorted(lines, key=lambda line: (line[0], line[1], line[3], line[2])):
        a, g, c, busy = line
        if not any(o[1] <= g and o[3] <= busy and (o[0] < a or o[1] < g or o[2] < c) for o in kept):
            kept.append(line)
    return sorted(kept, key=lambda line: line[2])


def _envelope(lines: list[_Line]) -> list[_Line]:
    """The lines that are least at some x > 0, in order of position. Lines that only touch the envelope stay, for ties."""
    if len(lines) < 3:
        return list(lines)
    ordered = sorted(lines, key=lambda line: (line[1], line[0], line[2]))  # by slope
    hull: list[_Line] = []
    lowest = _INFINITY
    for line in ordered:
        # a steeper line is never the least unless it starts below every flatter one
        if line[0] > lowest + _SLACK * abs(lowest):
            continue
        lowest = min(lowest, line[0])
        while len(hull) >= 2 and _above(hull[-2], hull[-1], line):
            hull.pop()
        hull.append(line)
    return sorted(hull, key=lambda line: line[2])


def _above(flat: _Line, middle: _Line, steep: _Line) -> bool:
    """Whether `middle` lies, at every x, above one of the other two lines by more than a rounding error."""
    if middle[1] == flat[1] or steep[1] == middle[1]:
        return middle[0] > (flat[0] if middle[1] == flat[1] else steep[0])
    # compare `middle` with the point at which `flat` and `steep` meet
    x = (flat[0] - steep[0]) / (steep[1] - flat[1])
    if x <= 0:
        return False
    meet = flat[0] + flat[1] * x
    value = middle[0] + middle[1] * x
    return value > meet + _SLACK * (abs(meet) + abs(flat[0]) + abs(steep[0]))


def exhaustive(
    costs: Costs,
    family: int,
    link1_bps: float,
    link2_bps: float,
    samples: int,
    objective: Objective,
    input_bytes: int | None = None,
    allowed1: Iterable[int] | None = None,
    allowed2: Iterable[int] | None = None,
    overheads: Overheads = NO_OVERHEADS,
) -> Found | None:
    """The paper's search over every pair of a family in order; the reference for tests and benchmarks of `CutSearch`."""
    layers = costs.layers
    ones = sorted(range(layers + 1) if allowed1 is None else set(allowed1))
    twos = sorted(range(layers + 1) if allowed2 is None else set(allowed2))
    best: Found | None = None
    for cut1 in ones:
        for cut2 in twos:
            if cut1 > cut2 or family_of(cut1, cut2, layers) != family:
                continue
            delay = costs.delay_s(cut1, cut2, link1_bps, link2_bps, samples, objective, input_bytes, overheads)
            if best is None or delay < best[0]:
                best = delay, cut1, cut2
    return best
