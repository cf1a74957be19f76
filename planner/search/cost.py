"""The delay of a placement: its parts (1)-(6), and the two objectives computed from them.

The module uses two tables of the paper: F(j, k), the time that platform k needs for layers 1..j of one sample, and G(j), the
bytes that cross the cut after layer j. Times are in seconds, sizes in bytes, bandwidths in bits per second.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from bus.errors import ConfigError
from bus.unchecked_constructors import maker
from bus.values import BITS_PER_BYTE, ModelProfile, Objective, Parts

_parts = maker(Parts)


class PlatformRow:
    """One platform's row of F for one model, with the model's G. Compared by identity: see `RowTable`."""

    __slots__ = ("compute_s", "cut_bytes", "forbidden", "layers", "model", "names", "sha256")

    def __init__(self, profile: ModelProfile) -> None:
        self.model = profile.model
        self.sha256 = profile.sha256
        self.names = profile.layer_names
        self.layers = profile.layers
        self.compute_s: tuple[float, ...] = tuple(accumulate(profile.layer_s, initial=0.0))  # F(0..l), F(0) = 0
        self.cut_bytes = profile.cut_bytes  # G(0..l)
        self.forbidden = frozenset(profile.forbidden)

    def __repr__(self) -> str:
        return f"<PlatformRow {self.model} {self.layers} layers {self.compute_s[-1]:.6g} s>"


class RowTable:
    """A table in which equal profiles share one row, so that a search prepared for one device serves all of the same type."""

    def __init__(self) -> None:
        self._rows: dict[tuple[object, ...], PlatformRow] = {}

    def row(self, profile: ModelProfile) -> PlatformRow:
        """The row of a profile; equal profiles get the same object."""
        key = (
            profile.model,
            profile.sha256,
            profile.layer_names,
            profile.layer_s,
            profile.cut_bytes,
            profile.forbidden,
        )
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= 20_000:  # nodes keep the rows that they use; clearing only ends the sharing
                self._rows.clear()
            row = self._rows[key] = PlatformRow(profile)
        return row


class SampleParts(NamedTuple):
    """The parts of one sample in seconds; the result crosses link 2 (`s6b`), then link 1 (`s6a`)."""

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

    __slots__ = ("cloud", "cut_bytes", "device", "edge", "layers")

    def __init__(self, device: PlatformRow, edge: PlatformRow | None, cloud: PlatformRow | None) -> None:
        for other in (edge, cloud):
            if other is not None and (other.layers != device.layers or other.sha256 != device.sha256):
                raise ConfigError(f"profiles of different models: {device!r} and {other!r}")
        self.layers = device.layers
        self.device = device.compute_s
        self.edge = edge.compute_s if edge is not None else None
        self.cloud = cloud.compute_s if cloud is not None else None
        self.cut_bytes = device.cut_bytes

    def sample_parts(
        self, cut1: int, cut2: int, link1_bps: float, link2_bps: float, input_bytes: int | None = None
    ) -> SampleParts:
        """(1)-(6) for one sample. `input_bytes` replaces G(0). The bandwidth of an unused link is ignored."""
        return SampleParts(*self._sample_parts(cut1, cut2, link1_bps, link2_bps, input_bytes))

    def _sample_parts(
        self, cut1: int, cut2: int, link1_bps: float, link2_bps: float, input_bytes: int | None
    ) -> tuple[float, float, float, float, float, float, float]:
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
            s3 = self.edge[cut2] - self.edge[cut1]
        if cut2 == layers:
            return device[cut1], bytes1 * s_per_byte1, s3, 0.0, 0.0, 0.0, result * s_per_byte1
        if self.cloud is None:
            raise ConfigError("the cloud does not run this model")
        s_per_byte2 = BITS_PER_BYTE / link2_bps
        bytes2 = bytes1 if cut2 == cut1 else sizes[cut2]
        s5 = self.cloud[layers] - self.cloud[cut2]
        return (
            device[cut1],
            bytes1 * s_per_byte1,
            s3,
            bytes2 * s_per_byte2,
            s5,
            result * s_per_byte2,
            result * s_per_byte1,
        )

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
        s1, s2, s3, s4, s5, s6b, s6a = self._sample_parts(cut1, cut2, link1_bps, link2_bps, input_bytes)
        return _parts(
            device_s=samples * s1,
            link1_s=samples * s2,
            edge_s=samples * s3,
            link2_s=samples * s4,
            cloud_s=samples * s5,
            result_s=samples * (s6b + s6a),
        )

    def delay_s(
        self,
        cut1: int,
        cut2: int,
        link1_bps: float,
        link2_bps: float,
        samples: int,
        objective: Objective,
        input_bytes: int | None = None,
    ) -> float:
        """Seconds from the start to the last result: (7) or the pipelined delay, as the objective says.

        Adds the same terms in the same order as `delay_of(sample_parts(...))`, but creates no `SampleParts`, because the
        planner calls this method more often than any other.
        """
        layers, sizes = self.layers, self.cut_bytes
        s1 = self.device[cut1]
        if cut1 == layers:
            return samples * s1 if objective is Objective.SEQUENTIAL else s1 + (samples - 1) * s1
        edge, cloud = self.edge, self.cloud
        if (edge is None and cut1 != cut2) or (cloud is None and cut2 != layers):
            raise ConfigError("the edge or the cloud does not run this model")
        s_per_byte1 = BITS_PER_BYTE / link1_bps
        bytes1 = input_bytes if cut1 == 0 and input_bytes is not None else sizes[cut1]
        s2 = bytes1 * s_per_byte1
        s3 = edge[cut2] - edge[cut1] if edge is not None and cut1 != cut2 else 0.0
        s6a = sizes[layers] * s_per_byte1
        if cut2 == layers or cloud is None:
            one = s1 + s2 + s3 + s6a
            if objective is Objective.SEQUENTIAL:
                return samples * one
            return one + (samples - 1) * max(s1, s2, s3, s6a)
        s_per_byte2 = BITS_PER_BYTE / link2_bps
        s4 = (bytes1 if cut2 == cut1 else sizes[cut2]) * s_per_byte2
        s5 = cloud[layers] - cloud[cut2]
        s6b = sizes[layers] * s_per_byte2
        one = s1 + s2 + s3 + s4 + s5 + (s6b + s6a)
        if objective is Objective.SEQUENTIAL:
            return samples * one
        return one + (samples - 1) * max(s1, s2, s3, s4, s5, s6b, s6a)


def delay_of(parts: SampleParts, samples: int, objective: Objective) -> float:
    """`sequential`: N (s1 + ... + s6), (7). `pipelined`: (s1 + ... + s6) + (N - 1) max(s1, ..., s5, s6a, s6b)."""
    s1, s2, s3, s4, s5, s6b, s6a = parts
    one = s1 + s2 + s3 + s4 + s5 + (s6b + s6a)
    if objective is Objective.SEQUENTIAL:
        return samples * one
    return one + (samples - 1) * max(parts)
