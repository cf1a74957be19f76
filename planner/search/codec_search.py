"""An exact search for the best two cuts and the codecs of both crossings, at given bandwidths.

A *way* is a pair of crossings, and a crossing is a cut with a codec. With a codec q, G(c) becomes G(c, q), encoding joins the
time of the sender, and decoding that of the receiver (`planner.search.cost`). So a way has five numbers that do not depend on
the bandwidths: the times of device, edge and cloud, and the bytes on each link. `Ways` holds them for all ways of a family;
the search evaluates all of them in one numpy pass, with either objective. Without codecs, `CutSearch` finds the same sooner.

**Agreement.** Lossless codecs are always allowed. Lossy ones are allowed with the task's consent (`min_agreement`), where the
measured agreement of all lossy crossings of the way together is at least that. Errors compound, so two lossy crossings need
the agreement of the pair; a pair that was not measured is not used.

A codec is used on a link only if the device, the sender and the receiver have measured it: a node that does not know it
announces none. An encoding that is not smaller than the raw activations is left out.

A task with inputs of its own size sends them raw, because the measured sizes are those of other inputs.

Ties: the smaller cut1 wins, then its codec in the order of `Codec`, then cut2 and its codec.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from bus.values import BITS_PER_BYTE, Codec, Objective
from planner.search.cost import NO_OVERHEADS, RAW, Codecs, Costs, Crossing, Overheads, PlatformRow, stations_s
from planner.search.cut_search import CutSearch
from planner.search.families import DEVICE, DEVICE_CLOUD, DEVICE_EDGE

_CODED: Final = tuple(codec for codec in Codec if codec is not Codec.RAW)
_INFINITY: Final = float("inf")
_WAY_BYTES: Final = 100  # memory of a way
_CROSSING_BYTES: Final = 500  # memory of a crossing
_Times = npt.NDArray[np.float64]


def codec_search_bytes(layers: int, codings: int) -> int:
    """An upper bound of the memory that a prepared search holds for a model with this many measured codecs."""
    crossings = layers + codings
    return crossings * crossings // 2 * _WAY_BYTES + crossings * _CROSSING_BYTES + 20_000


Rows = tuple[PlatformRow, PlatformRow | None, PlatformRow | None]
"""Device, edge and cloud. A tier that does not run the model is None."""


def may_encode(rows: Rows, consent: float | None) -> bool:
    """Whether a task with this consent may use a codec on a link between these platforms."""
    device, edge, cloud = rows
    return any(
        (consent is not None or crossing[1].lossless)
        and any(row is not None and crossing in row.codings for row in (edge, cloud))
        for crossing in device.codings
    )


class CodedFound(NamedTuple):
    """The best way of a family."""

    delay_s: float
    cut1: int
    cut2: int
    codecs: Codecs


class Ways:
    """All ways of a family, ordered as ties are decided, with their terms that do not depend on the bandwidths."""

    __slots__ = (
        "_busy_s",
        "_room1",
        "_room2",
        "_room3",
        "_total_s",
        "bytes1",
        "bytes2",
        "cloud_s",
        "device_s",
        "edge_s",
        "first",
        "raw_inputs",
        "second",
        "uncut",
    )

    def __init__(self, first: _Sent, second: _Sent, device_s: _Times, edge_s: _Times, cloud_s: _Times) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            total_s = device_s + edge_s + cloud_s
        kept = np.isfinite(total_s)
        first, second = first.at(kept), second.at(kept)
        self.first, self.second = first.crossings, second.crossings
        self.bytes1, self.bytes2 = first.size_bytes, second.size_bytes  # of one sample
        self.device_s, self.edge_s, self.cloud_s = device_s[kept], edge_s[kept], cloud_s[kept]
        self.uncut = sum(cut == 0 for cut, _ in self.first)  # ways with cut1 = 0, which come first
        self.raw_inputs = sum(crossing == (0, Codec.RAW) for crossing in self.first)  # the first of these
        self._total_s = total_s[kept]
        self._busy_s = np.maximum(np.maximum(self.device_s, self.edge_s), self.cloud_s)
        self._room1, self._room2, self._room3 = (np.empty_like(self._total_s) for _ in range(3))

    def least(
        self, per_byte: tuple[float, float], input_bytes: int | None, result_bytes: int, more: int, device_free: bool
    ) -> int | None:
        """The index of the best way at these seconds per byte of both links, or None if there is none.

        `more`: how often the slowest station counts beside the sum. `input_bytes`: of a task with inputs of its own size.
        """
        x1, x2 = per_byte
        count = len(self.first) if device_free else self.uncut
        if not count:
            return None
        one, two, busy = self._room1[:count], self._room2[:count], self._room3[:count]
        np.multiply(self.bytes1[:count], x1, out=one)
        np.multiply(self.bytes2[:count], x2, out=two)
        if input_bytes is not None:
            one[: self.raw_inputs] = input_bytes * x1
            if self.second[0][0] == 0:  # relayed
                two[: self.raw_inputs] = input_bytes * x2
            one[self.raw_inputs : self.uncut] = _INFINITY
        if more:
            np.maximum(one, two, out=busy)
            np.maximum(busy, self._busy_s[:count], out=busy)
            np.maximum(busy, result_bytes * max(x1, x2), out=busy)
            with np.errstate(over="ignore"):
                np.multiply(busy, more, out=busy)
        np.add(one, two, out=one)
        np.add(one, self._total_s[:count], out=one)
        if more:
            np.add(one, busy, out=one)
        return int(one.argmin())


class _Sent(NamedTuple):
    """Crossings of one link, in order of cut and codec: what is sent, and what encoding and decoding take."""

    crossings: list[Crossing]
    cut: npt.NDArray[np.intp]
    size_bytes: _Times
    encode_s: _Times
    decode_s: _Times
    agreement: _Times  # if it is the only lossy crossing; infinite for lossless codecs, -1 where it was not measured

    @classmethod
    def of(cls, rows: list[tuple[Crossing, int, float, float, float]]) -> _Sent:
        """From rows of crossing, bytes, seconds of encoding and decoding, and agreement."""
        crossings = [row[0] for row in rows]
        cut = np.array([cut for cut, _ in crossings], dtype=np.intp)
        size_bytes, encode_s, decode_s, agreement = (
            np.array([row[1:] for row in rows], dtype=np.float64).reshape(-1, 4).T
        )
        return cls(crossings, cut, size_bytes, encode_s, decode_s, agreement)

    def at(self, where: npt.NDArray[Any]) -> _Sent:
        """Those at some indices, or where a flag is set."""
        indices = np.arange(len(self.crossings))[where]
        return _Sent([self.crossings[i] for i in indices.tolist()], *(column[indices] for column in self[1:]))


class CodecSearch:
    """A prepared search for one model on one device, edge and cloud, and one consent; used in place of a `CutSearch`.

    `consent`: the least agreement of lossy codecs; None: lossless ones only. `allowed1` and `allowed2` as in `CutSearch`.
    """

    __slots__ = ("_allowed1", "_allowed2", "_least_agreement", "_rows", "_ways", "beside", "costs", "forbidden")

    def __init__(
        self,
        rows: Rows,
        consent: float | None,
        allowed1: Iterable[int] | None = None,
        allowed2: Iterable[int] | None = None,
    ) -> None:
        self._rows = rows
        self._least_agreement = _INFINITY if consent is None else consent
        self.costs = Costs(*rows)
        self.forbidden = rows[0].forbidden.union(*(row.forbidden for row in rows[1:] if row is not None))
        everywhere = range(self.costs.layers + 1)
        self._allowed1 = frozenset(everywhere if allowed1 is None else allowed1) - self.forbidden
        self._allowed2 = frozenset(everywhere if allowed2 is None else allowed2) - self.forbidden
        self._ways: dict[int, Ways | None] = {}
        self.beside: Any = None  # as of `CutSearch`

    def device_s(self, samples: int, objective: Objective, overheads: Overheads = NO_OVERHEADS) -> float | None:
        """w_0, the delay of the whole model on the device; None if not allowed."""
        layers = self.costs.layers
        if layers not in self._allowed1 or layers not in self._allowed2:
            return None
        return self.costs.delay_s(layers, layers, 1, 1, samples, objective, None, overheads)

    def codecs_at(self, cut1: int, cut2: int, *, own_input: bool = False) -> list[Codecs]:
        """The allowed codecs of two cuts, in the order in which ties are decided.

        `own_input`: of a task with inputs of its own size.
        """
        device, edge, cloud = self._rows
        layers, relayed = self.costs.layers, cut1 == cut2
        if cut1 == layers:
            return [RAW]
        ones, twos = [Codec.RAW], [Codec.RAW]
        if cut1 > 0 or not own_input:
            ones += [codec for codec in _CODED if self._usable((cut1, codec), device, cloud if relayed else edge)]
        if relayed:
            pairs = [(codec, codec) for codec in ones]
        else:
            if cut2 < layers:
                twos += [codec for codec in _CODED if self._usable((cut2, codec), edge, cloud)]
            pairs = list(product(ones, twos))
        return [pair for pair in pairs if self._agreement((cut1, pair[0]), (cut2, pair[1])) >= self._least_agreement]

    def _usable(self, crossing: Crossing, sender: PlatformRow | None, receiver: PlatformRow | None) -> bool:
        """Whether device, sender and receiver have measured a codec, and it makes the activations smaller."""
        device = self._rows[0]
        sent = device.codings.get(crossing)
        return (
            sent is not None
            and sent.size_bytes < device.cut_bytes[crossing[0]]
            and all(row is not None and crossing in row.codings for row in (sender, receiver))
        )

    def _agreement(self, crossing1: Crossing, crossing2: Crossing) -> float:
        """The agreement of both crossings together: infinite if they are lossless, -1 if it was not measured."""
        device = self._rows[0]
        lossy = [crossing for crossing in dict.fromkeys((crossing1, crossing2)) if not crossing[1].lossless]
        if not lossy:
            return _INFINITY
        found = device.codings[lossy[0]].agreement if len(lossy) == 1 else device.agreements.get((lossy[0], lossy[1]))
        return -1.0 if found is None else found

    def ways(self, family: int) -> Ways | None:
        """All ways of a family that uses a link, or None if a tier does not run the model."""
        if family not in self._ways:
            if family == DEVICE_EDGE:
                self._ways[family] = self._through_edge()
            else:
                self._ways[family] = self._relayed() if family == DEVICE_CLOUD else self._through_all()
        return self._ways[family]

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
    ) -> CodedFound | None:
        """The least delay of a family, its cuts and codecs, or None if the family has no allowed way.

        If `device_free` is False, only cut1 = 0 is tried. `DEVICE_EDGE` ignores `link2_bps`.
        """
        costs = self.costs
        layers = costs.layers
        if family == DEVICE:
            alone = self.device_s(samples, objective, overheads)
            return None if alone is None or not device_free else CodedFound(alone, layers, layers, RAW)
        ways = self.ways(family)
        if ways is None:
            return None
        per_byte = BITS_PER_BYTE / link1_bps, 0.0 if family == DEVICE_EDGE else BITS_PER_BYTE / link2_bps
        other = None if input_bytes == costs.cut_bytes[0] else input_bytes
        more = samples - 1 if objective is Objective.PIPELINED else 0
        at = ways.least(per_byte, other, costs.cut_bytes[layers], more, device_free)
        if at is None:
            return None
        (cut1, codec1), (cut2, codec2) = ways.first[at], ways.second[at]
        one = costs.sample_parts(cut1, cut2, link1_bps, link2_bps, input_bytes, (codec1, codec2))
        delay_s = stations_s(one, samples, objective)
        if overheads is not NO_OVERHEADS:
            delay_s += overheads.total_s(family, samples, objective)
        return CodedFound(delay_s, cut1, cut2, (codec1, codec2))

    def _through_edge(self) -> Ways | None:
        """cut2 = l: one crossing, and the edge computes the rest."""
        device, edge, _ = self._rows
        costs, layers = self.costs, self.costs.layers
        if edge is None or costs.edge is None or layers not in self._allowed2:
            return None
        sent = self._allowed(self._sent(device, edge, self._allowed1 - {layers}))
        nothing = _Sent.of([((layers, Codec.RAW), 0, 0.0, 0.0, _INFINITY)] * len(sent.crossings))
        edge_s = costs.edge[layers] - np.array(costs.edge)[sent.cut] + costs.edge_overhead_s + sent.decode_s
        return Ways(sent, nothing, self._device_s(sent), edge_s, np.zeros(len(edge_s)))

    def _relayed(self) -> Ways | None:
        """cut1 = cut2: the edge passes on what it gets."""
        device, _, cloud = self._rows
        if cloud is None:
            return None
        sent = self._allowed(self._sent(device, cloud, (self._allowed1 & self._allowed2) - {self.costs.layers}))
        cloud_s = self._cloud_s(sent)
        return Ways(sent, sent, self._device_s(sent), np.zeros(len(cloud_s)), cloud_s)

    def _through_all(self) -> Ways | None:
        """cut1 < cut2 < l: two crossings."""
        device, edge, cloud = self._rows
        costs, layers = self.costs, self.costs.layers
        if edge is None or cloud is None or costs.edge is None:
            return None
        one, two = (
            self._sent(device, edge, self._allowed1 - {layers}),
            self._sent(edge, cloud, self._allowed2 - {layers}),
        )
        at1, at2 = np.nonzero(self._allowed_pairs(one, two))
        first, second = one.at(at1), two.at(at2)
        row = np.array(costs.edge)
        edge_s = row[second.cut] - row[first.cut] + costs.edge_overhead_s + first.decode_s + second.encode_s
        return Ways(first, second, self._device_s(first), edge_s, self._cloud_s(second))

    def _sent(self, sender: PlatformRow, receiver: PlatformRow, cuts: Iterable[int]) -> _Sent:
        """All crossings between two tiers at some cuts, allowed or not."""
        device = self._rows[0]
        rows: list[tuple[Crossing, int, float, float, float]] = []
        for cut in sorted(cuts):
            rows.append(((cut, Codec.RAW), device.cut_bytes[cut], 0.0, 0.0, _INFINITY))
            for crossing in ((cut, codec) for codec in _CODED):
                if self._usable(crossing, sender, receiver):
                    encode_s, decode_s = sender.codings[crossing].encode_s, receiver.codings[crossing].decode_s
                    size_bytes, agreement = device.codings[crossing].size_bytes, self._agreement(crossing, crossing)
                    rows.append((crossing, size_bytes, encode_s, decode_s, agreement))
        return _Sent.of(rows)

    def _device_s(self, sent: _Sent) -> _Times:
        device_s: _Times = np.array(self.costs.device)[sent.cut] + sent.encode_s
        return device_s

    def _cloud_s(self, sent: _Sent) -> _Times:
        costs = self.costs
        assert costs.cloud is not None
        row = np.array(costs.cloud)
        cloud_s: _Times = row[-1] - row[sent.cut] + costs.cloud_overhead_s + sent.decode_s
        return cloud_s

    def _allowed(self, sent: _Sent) -> _Sent:
        """The crossings that are allowed where activations cross only once."""
        return sent.at(sent.agreement >= self._least_agreement)

    def _allowed_pairs(self, one: _Sent, two: _Sent) -> npt.NDArray[np.bool_]:
        """Which crossing of link 1 is allowed with which of link 2."""
        least = self._least_agreement
        allowed = np.outer(one.agreement >= least, two.agreement >= least)
        allowed &= ~np.outer(np.isfinite(one.agreement), np.isfinite(two.agreement))  # not both lossy
        at1, at2 = ({crossing: i for i, crossing in enumerate(sent.crossings)} for sent in (one, two))
        for (crossing1, crossing2), agreement in self._rows[0].agreements.items():
            if agreement >= least and crossing1 in at1 and crossing2 in at2:
                allowed[at1[crossing1], at2[crossing2]] = True
        allowed &= np.less.outer(one.cut, two.cut)
        return allowed


PathSearch = CutSearch | CodecSearch
"""A prepared search through an edge."""
