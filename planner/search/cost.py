"""The delay of a placement: its parts (1)-(6), latencies and overheads, and the two objectives computed from them.

The module uses two tables of the paper: F(j, k), the time that platform k needs for layers 1..j of one sample, and G(j), the
bytes that cross the cut after layer j. Times are in seconds, sizes in bytes, bandwidths in bits per second.

The paper has neither latencies nor overheads. Here they default to 0, which leaves (1)-(7) as they are:

* A platform that computes layers of a sample needs `overhead_s` for the sample beside the layers. This adds to s_k.
* L1 and L2 are the one-way latencies of the links, t the overhead of a task, u the overhead of a sample at no particular
  station. `Overheads` has them.

With s_k the station times of a sample, N samples, and l the latency of a sample (2 L1 over link 1, 2 (L1 + L2) over both):

* sequential: t + N u + N (s_1 + ... + s_6 + l)
* pipelined: t + N u + (s_1 + ... + s_6 + l) + (N - 1) max s_k

All cuts of a family have the same t, u and l, so these do not change which cuts of a family are best.

With codecs, G(j) becomes G(j, q): the encoded bytes, as the device's profile says. Encoding joins the time of the sender (s_1
or s_3), decoding that of the receiver (s_3 or s_5), as their profiles say. Where cut1 = cut2 the edge passes on what it gets:
the device encodes and the cloud decodes.

With batches, s_3 and s_5 are the times between two samples of a task on an edge or cloud that other tasks use as well
(`planner.search.batch_load`), while busy times are the samples' shares of their batches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Final, NamedTuple

from bus.errors import ConfigError
from bus.messages import Placed
from bus.unchecked_constructors import maker
from bus.values import BITS_PER_BYTE, STATIONS, BatchLoad, Codec, ModelProfile, Objective, Parts, Route
from planner.search.batch_load import under_load
from planner.search.families import DEVICE, DEVICE_EDGE, family_of

_parts = maker(Parts)

Crossing = tuple[int, Codec]
"""A cut, and the codec with which its activations cross the link."""

Codecs = tuple[Codec, Codec]
"""The codecs of both crossings; equal where cut1 = cut2, which is one crossing of both links."""

RAW: Final[Codecs] = (Codec.RAW, Codec.RAW)


class Coding(NamedTuple):
    """One codec at one position, on one platform."""

    size_bytes: int  # G(j, q) of one sample
    encode_s: float
    decode_s: float
    agreement: float | None  # if this is the only lossy crossing; None: not measured


class PlatformRow:
    """One platform's row of F for one model, with the model's G. Compared by identity: see `RowTable`.

    `factor` scales the profile's times: 2.0 if the platform is twice as slow as profiled. `load`: what other tasks do to a
    platform that computes in batches.
    """

    __slots__ = (
        "_levels",
        "agreements",
        "codings",
        "compute_s",
        "cut_bytes",
        "forbidden",
        "layers",
        "load",
        "model",
        "names",
        "overhead_s",
        "sha256",
    )

    def __init__(
        self, profile: ModelProfile, factor: float = 1.0, overhead_s: float = 0.0, load: BatchLoad | None = None
    ) -> None:
        if load is not None:
            profile, overhead_s = under_load(profile, load), overhead_s * load.apart
        self.load = load
        self.model = profile.model
        self.sha256 = profile.sha256
        self.names = profile.layer_names
        self.layers = profile.layers
        compute_s = accumulate(profile.layer_s, initial=0.0)
        self.compute_s: tuple[float, ...] = tuple(factor * s for s in compute_s)  # F(0..l), F(0) = 0
        self.overhead_s = overhead_s  # of each sample that the platform computes
        self.cut_bytes = profile.cut_bytes  # G(0..l)
        self.forbidden = frozenset(profile.forbidden)
        self.codings: Mapping[Crossing, Coding] = {
            (one.position, one.codec): Coding(one.bytes, factor * one.encode_s, factor * one.decode_s, one.agreement)
            for one in profile.codecs or ()
        }
        self.agreements: Mapping[tuple[Crossing, Crossing], float] = {  # of pairs of lossy crossings
            ((pair.position1, pair.codec1), (pair.position2, pair.codec2)): pair.agreement
            for pair in profile.agreements or ()
        }
        single = (coding.agreement for coding in self.codings.values() if coding.agreement is not None)
        self._levels = sorted({*single, *self.agreements.values()})

    def consent(self, min_agreement: float | None) -> float | None:
        """The least measured agreement that is enough for a task, so that tasks that allow the same share a search.

        None: no lossy codec is allowed.
        """
        if min_agreement is None or not self._levels or min_agreement > self._levels[-1]:
            return None
        return self._levels[bisect_left(self._levels, min_agreement)]

    def __repr__(self) -> str:
        return f"<PlatformRow {self.model} {self.layers} layers {self.compute_s[-1]:.6g} s>"


class RowTable:
    """A table in which equal profiles share one row, so that a search prepared for one device serves all of the same type."""

    def __init__(self) -> None:
        self._rows: dict[tuple[object, ...], PlatformRow] = {}

    def row(
        self, profile: ModelProfile, factor: float = 1.0, overhead_s: float = 0.0, load: BatchLoad | None = None
    ) -> PlatformRow:
        """The row of a profile; equal profiles with equal factors, overheads and loads get the same object."""
        key = (
            profile.model,
            profile.sha256,
            profile.layer_names,
            profile.layer_s,
            profile.cut_bytes,
            profile.forbidden,
            profile.codecs,
            profile.agreements,
            factor,
            overhead_s,
            load,
            profile.batch if load is not None else None,
        )
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= 20_000:  # nodes keep the rows that they use; clearing only ends the sharing
                self._rows.clear()
            row = self._rows[key] = PlatformRow(profile, factor, overhead_s, load)
        return row


ByFamily = tuple[float, float, float, float]
"""One value for each family of placements (`planner.search.families`)."""


class Overheads(NamedTuple):
    """What a placement costs besides its stations: the latencies and overheads of one device and one edge."""

    link1_latency_s: float = 0.0  # L1, one way, network and bus
    link2_latency_s: float = 0.0  # L2
    task_s: ByFamily = (0.0, 0.0, 0.0, 0.0)  # t
    sample_s: ByFamily = (0.0, 0.0, 0.0, 0.0)  # u

    def latency_s(self, family: int) -> float:
        """l, the latency of one sample: there and back over each link that the family uses."""
        if family == DEVICE:
            return 0.0
        if family == DEVICE_EDGE:
            return 2.0 * self.link1_latency_s
        return 2.0 * (self.link1_latency_s + self.link2_latency_s)

    def shares_s(self, family: int, samples: int, objective: Objective) -> tuple[float, float]:
        """The shares of latency and of overheads in the delay of a task."""
        crossings = samples if objective is Objective.SEQUENTIAL else 1
        return crossings * self.latency_s(family), self.task_s[family] + samples * self.sample_s[family]

    def total_s(self, family: int, samples: int, objective: Objective) -> float:
        """Their share of the delay of a task: t + N u + N l if sequential, t + N u + l if pipelined.

        Never negative: learned overheads correct latencies that were measured too high, for example while the bus was away,
        and would otherwise predict a delay below that of the stations when the latency falls again.
        """
        crossings = samples if objective is Objective.SEQUENTIAL else 1
        return max(0.0, self.task_s[family] + samples * self.sample_s[family] + crossings * self.latency_s(family))


NO_OVERHEADS: Final = Overheads()


StationTimes = tuple[float, float, float, float, float, float, float]
"""The fields of `SampleParts`, in seconds."""


class SampleParts(NamedTuple):
    """The station times of one sample in seconds; the result crosses link 2 (`s6b`), then link 1 (`s6a`)."""

    s1: float
    s2: float
    s3: float
    s4: float
    s5: float
    s6b: float
    s6a: float


class Costs:
    """The delays of one model on one device, one edge and one cloud. A tier that does not run the model is None.

    Raises `ConfigError` if the rows belong to different models.
    """

    __slots__ = (
        "_codings",
        "cloud",
        "cloud_load",
        "cloud_overhead_s",
        "cut_bytes",
        "device",
        "edge",
        "edge_load",
        "edge_overhead_s",
        "layers",
    )

    def __init__(self, device: PlatformRow, edge: PlatformRow | None, cloud: PlatformRow | None) -> None:
        for other in (edge, cloud):
            if other is not None and (other.layers != device.layers or other.sha256 != device.sha256):
                raise ConfigError(f"profiles of different models: {device!r} and {other!r}")
        self.layers = device.layers
        first, *others = device.compute_s
        self.device = (first, *(s + device.overhead_s for s in others))  # of a sample that the device computes in part
        self.edge = edge.compute_s if edge is not None else None
        self.cloud = cloud.compute_s if cloud is not None else None
        self.edge_overhead_s = edge.overhead_s if edge is not None else 0.0
        self.cloud_overhead_s = cloud.overhead_s if cloud is not None else 0.0
        self.edge_load = edge.load if edge is not None else None
        self.cloud_load = cloud.load if cloud is not None else None
        self.cut_bytes = device.cut_bytes
        self._codings = tuple({} if row is None else row.codings for row in (device, edge, cloud))

    def sample_parts(
        self,
        cut1: int,
        cut2: int,
        link1_bps: float,
        link2_bps: float,
        input_bytes: int | None = None,
        codecs: Codecs = RAW,
    ) -> SampleParts:
        """(1)-(6) for one sample. `input_bytes` replaces G(0). The bandwidth of an unused link is ignored.

        Raises `ConfigError` for a tier that does not run the model, and for a codec that was not measured where it is used.
        """
        parts = self._sample_parts(cut1, cut2, link1_bps, link2_bps, input_bytes)
        if codecs != RAW and cut1 < self.layers:
            parts = self._coded(parts, (cut1, codecs[0]), (cut2, codecs[1]), link1_bps, link2_bps)
        return SampleParts(*parts)

    def _coded(
        self, raw: StationTimes, crossing1: Crossing, crossing2: Crossing, link1_bps: float, link2_bps: float
    ) -> StationTimes:
        """The station times of a sample with codecs, from those without."""
        s1, s2, s3, s4, s5, s6b, s6a = raw
        device, edge, cloud = self._codings
        relayed = crossing1[0] == crossing2[0]
        try:
            if crossing1[1] is not Codec.RAW:
                sent = device[crossing1]
                s1, s2 = s1 + sent.encode_s, sent.size_bytes * (BITS_PER_BYTE / link1_bps)
                if relayed:
                    s4, s5 = sent.size_bytes * (BITS_PER_BYTE / link2_bps), s5 + cloud[crossing1].decode_s
                else:
                    s3 += edge[crossing1].decode_s
            if crossing2[1] is not Codec.RAW and not relayed and crossing2[0] < self.layers:
                s3, s5 = s3 + edge[crossing2].encode_s, s5 + cloud[crossing2].decode_s
                s4 = device[crossing2].size_bytes * (BITS_PER_BYTE / link2_bps)
        except KeyError as error:
            raise ConfigError(f"codec not measured at this cut: {error}") from None
        return s1, s2, s3, s4, s5, s6b, s6a

    def _sample_parts(
        self, cut1: int, cut2: int, link1_bps: float, link2_bps: float, input_bytes: int | None
    ) -> StationTimes:
        layers, sizes, device = self.layers, self.cut_bytes, self.device
        if cut1 == layers:
            return device[layers], 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        result = sizes[layers]
        s_per_byte1 = BITS_PER_BYTE / link1_bps
        bytes1 = input_bytes if cut1 == 0 and input_bytes is not None else sizes[cut1]
        s3 = 0.0
        if cut1 != cut2:
            if self.edge is None:
                raise ConfigError("the edge does not run this model")
            s3 = self.edge[cut2] - self.edge[cut1] + self.edge_overhead_s
        if cut2 == layers:
            return device[cut1], bytes1 * s_per_byte1, s3, 0.0, 0.0, 0.0, result * s_per_byte1
        if self.cloud is None:
            raise ConfigError("the cloud does not run this model")
        s_per_byte2 = BITS_PER_BYTE / link2_bps
        bytes2 = bytes1 if cut2 == cut1 else sizes[cut2]
        s5 = self.cloud[layers] - self.cloud[cut2] + self.cloud_overhead_s
        return (
            device[cut1],
            bytes1 * s_per_byte1,
            s3,
            bytes2 * s_per_byte2,
            s5,
            result * s_per_byte2,
            result * s_per_byte1,
        )

    def busy_parts(self, sample: StationTimes, samples: int) -> Parts:
        """The busy seconds of each station for all samples, from the station times of one.

        Of a platform that computes in batches: the samples' shares of their batches.
        """
        s1, s2, s3, s4, s5, s6b, s6a = sample
        if self.edge_load is not None:
            s3 /= self.edge_load.apart
        if self.cloud_load is not None:
            s5 /= self.cloud_load.apart
        return busy_parts((s1, s2, s3, s4, s5, s6b, s6a), samples)

    def parts(
        self,
        cut1: int,
        cut2: int,
        link1_bps: float,
        link2_bps: float,
        samples: int,
        input_bytes: int | None = None,
    ) -> Parts:
        """(1)-(6) for all samples: the busy seconds of each station."""
        return self.busy_parts(self._sample_parts(cut1, cut2, link1_bps, link2_bps, input_bytes), samples)

    def delay_s(
        self,
        cut1: int,
        cut2: int,
        link1_bps: float,
        link2_bps: float,
        samples: int,
        objective: Objective,
        input_bytes: int | None = None,
        overheads: Overheads = NO_OVERHEADS,
    ) -> float:
        """Seconds from the start to the last result: (7) or the pipelined delay, as the objective says."""
        delay_s = stations_s(self._sample_parts(cut1, cut2, link1_bps, link2_bps, input_bytes), samples, objective)
        if overheads is NO_OVERHEADS:
            return delay_s
        return delay_s + overheads.total_s(family_of(cut1, cut2, self.layers), samples, objective)


def busy_parts(sample: StationTimes, samples: int) -> Parts:
    """The busy seconds of each station for all samples, from the station times of one."""
    s1, s2, s3, s4, s5, s6b, s6a = sample
    return _parts(
        device_s=samples * s1,
        link1_s=samples * s2,
        edge_s=samples * s3,
        link2_s=samples * s4,
        cloud_s=samples * s5,
        result_s=samples * (s6b + s6a),
    )


def mean_stations_s(shares: Iterable[float], routes: Iterable[Route]) -> StationTimes:
    """The station times of the mean sample, if routes have these shares."""
    weighted = ([share * s for s in route.stations_s] for share, route in zip(shares, routes, strict=True))
    s1, s2, s3, s4, s5, s6b, s6a = (sum(times) for times in zip(*weighted, strict=True))
    return s1, s2, s3, s4, s5, s6b, s6a


def stations_s(parts: StationTimes, samples: int, objective: Objective) -> float:
    """The stations' share of the delay.

    `sequential`: N (s1 + ... + s6), (7). `pipelined`: (s1 + ... + s6) + (N - 1) max(s1, ..., s5, s6a, s6b).
    """
    s1, s2, s3, s4, s5, s6b, s6a = parts
    one = s1 + s2 + s3 + s4 + s5 + (s6b + s6a)
    if objective is Objective.SEQUENTIAL:
        return samples * one
    return one + (samples - 1) * max(parts)


def parts_s(parts: Parts, placed: Placed) -> float:
    """The stations' share of the delay of a placement, from their busy times over all samples, predicted or measured.

    Several routes: the predicted share, and by how much the mean sample of these times takes longer than the predicted one.
    """
    routes = placed.placement.routes
    if routes is None or len(routes) == 1:
        return _of_mean_s(parts, placed)
    overhead = placed.overhead
    beside_s = 0.0 if overhead is None else max(0.0, overhead.latency_s + overhead.task_s)
    return placed.delay_s - beside_s + _of_mean_s(parts, placed) - _of_mean_s(placed.parts, placed)


def _of_mean_s(parts: Parts, placed: Placed) -> float:
    """The stations' share of a delay if all samples were like the mean of these busy times."""
    placement, samples, objective = placed.placement, placed.samples, placed.objective
    result_s, back_s = parts.result_s / samples, 0.0
    if placement.link2_bps and placement.link1_bps:  # the result crosses link 2, then link 1
        back_s = result_s * placement.link1_bps / (placement.link1_bps + placement.link2_bps)
    busy = (parts.device_s, parts.link1_s, parts.edge_s, parts.link2_s, parts.cloud_s)
    s1, s2, s3, s4, s5 = (
        placement.apart(part) * station_s / samples for part, station_s in zip(STATIONS, busy, strict=True)
    )
    return stations_s((s1, s2, s3, s4, s5, back_s, result_s - back_s), samples, objective)
