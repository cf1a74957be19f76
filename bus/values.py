"""The values in messages: a model's structure, its speed on a platform, and the placement of a task.

Values are frozen and validated when built. Times are in seconds, rates in bits per second, sizes in bytes. A *position* is a
place where a model of l layers may be cut: 0 is before the first layer, p is after layer p, and l is after the last layer.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable
from enum import StrEnum
from itertools import pairwise, product
from operator import itemgetter
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bus.errors import ConfigError

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+/:-]*$")]
"""A task or model name. Letters and digits, then also `.`, `_`, `+`, `/`, `:` and `-`."""

_NODE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
NodeName = Annotated[str, Field(min_length=1, max_length=100, pattern=_NODE_NAME)]
"""A node's name. It becomes part of topic names, so only letters, digits, `_` and `-` are allowed."""

Seconds = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
"""A duration. Its limit keeps sums and products of a few durations finite."""

SampleSeconds = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
"""A time that each sample takes. Its limit, about eleven days, keeps the predicted times of all tasks within `Seconds`."""

Bytes = Annotated[int, Field(ge=0, le=1 << 40)]
BitsPerSecond = Annotated[int, Field(ge=0, le=1 << 50)]

BITS_PER_BYTE = 8
"""The only conversion factor between bytes and bits in the project."""


def is_node_name(text: str) -> bool:
    """Whether a text, for example from a frame, can be a node's name."""
    return len(text) <= 100 and re.match(_NODE_NAME, text) is not None and not text.endswith("\n")


class Frozen(BaseModel):
    """Base of the values: immutable, compared by content. Unknown keys are ignored, so that messages of newer versions can be
    read.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Role(StrEnum):
    """The role of a node: its tier."""

    DEVICE = "device"
    EDGE = "edge"
    CLOUD = "cloud"


class Kind(StrEnum):
    """Which tiers compute. In the last three kinds cut1 is 0: the device only sends its input."""

    DEVICE = "device"
    DEVICE_EDGE = "device+edge"
    DEVICE_CLOUD = "device+cloud"
    DEVICE_EDGE_CLOUD = "device+edge+cloud"
    EDGE = "edge"
    EDGE_CLOUD = "edge+cloud"
    CLOUD = "cloud"

    @classmethod
    def of(cls, cut1: int, cut2: int, layers: int) -> Kind:
        """The kind of a pair of cuts, from the indicators x, y, z of (17)-(19)."""
        if cut1 == layers:
            return cls.DEVICE
        return _KIND_OF[cut1 > 0, cut1 != cut2, cut2 != layers]

    @classmethod
    def of_all(cls, cut_pairs: Iterable[tuple[int, int]], layers: int) -> Kind:
        """The kind of several pairs of cuts: all tiers that compute."""
        computing = {tier for cut1, cut2 in cut_pairs for tier in cls.of(cut1, cut2, layers).split("+")}
        return cls("+".join(role for role in Role if role in computing))


_KIND_OF = {
    computing: Kind(
        "+".join(tier for tier, computes in zip(("device", "edge", "cloud"), computing, strict=True) if computes)
    )
    for computing in product((False, True), repeat=3)
    if any(computing)
}


class Objective(StrEnum):
    """What the planner minimises: the sequential delay (7), or the time until the last result of a stream of samples."""

    SEQUENTIAL = "sequential"
    PIPELINED = "pipelined"

    @property
    def execution(self) -> Execution:
        """The execution that this objective assumes."""
        return Execution.STREAMING if self is Objective.PIPELINED else Execution.SEQUENTIAL

    def executed_as(self, execution: Execution | None) -> Execution:
        """The execution for this objective. Raises `ConfigError` if another one is requested."""
        if execution not in (None, self.execution):
            raise ConfigError(f"objective {self} requires execution {self.execution}, not {execution}")
        return self.execution


class Execution(StrEnum):
    """How the stages process a task: one sample at a time (as in the paper), or several samples at once in a pipeline."""

    SEQUENTIAL = "sequential"
    STREAMING = "streaming"


class Parts(Frozen):
    """The delay parts (1)-(6) of one task: busy seconds, summed over its samples."""

    device_s: Seconds = 0.0  # (1) computing on the device
    link1_s: Seconds = 0.0  # (2) sending device -> edge
    edge_s: Seconds = 0.0  # (3) computing on the edge
    link2_s: Seconds = 0.0  # (4) sending edge -> cloud
    cloud_s: Seconds = 0.0  # (5) computing in the cloud
    result_s: Seconds = 0.0  # (6) sending the results back

    @property
    def total_s(self) -> float:
        """The sequential delay (7)."""
        return self.device_s + self.link1_s + self.edge_s + self.link2_s + self.cloud_s + self.result_s

    def plus(self, other: Parts, times: float = 1.0) -> Parts:
        """These times and those of `other`, multiplied; never below 0."""
        return Parts(**{name: max(0.0, seconds + times * getattr(other, name)) for name, seconds in self})


DELAY_PARTS: Final = tuple(field.removesuffix("_s") for field in Parts.model_fields)
"""The names of the parts, in the order in which a sample passes them: device, link1, ..., result."""

STATIONS: Final = DELAY_PARTS[:-1]
"""The parts that a sample passes on its way to the last layer: all but the return of the result."""


class Codec(StrEnum):
    """How activations are encoded while they cross a link."""

    RAW = "raw"  # their bytes
    ZSTD = "zstd"  # shuffled bytes, compressed with Zstandard: lossless
    Q8 = "q8"  # 8 bits a value, then Zstandard: lossy
    Q4 = "q4"  # 4 bits a value, then Zstandard: lossy

    @property
    def lossless(self) -> bool:
        """Whether decoding gives the same bits."""
        return self in (Codec.RAW, Codec.ZSTD)


MAX_ROUTES = 8
"""Most routes of a placement: an optimal mix needs no more than there are stations, and one."""

StationSeconds = tuple[Seconds, Seconds, Seconds, Seconds, Seconds, Seconds, Seconds]
"""Times of one sample at the seven stations: s1..s5 of (1)-(5), then the result on link 2 and on link 1."""


class Route(Frozen):
    """One way of a task's samples: a pair of cuts, the codecs of the two crossings, and the share of the samples."""

    cut1: Annotated[int, Field(ge=0)]  # last layer of the device
    cut2: Annotated[int, Field(ge=0)]  # last layer of the edge
    share: Annotated[float, Field(ge=0, le=1)]  # of the task's samples; the shares of a placement sum to 1
    codec1: Codec = Codec.RAW  # on link 1
    codec2: Codec = Codec.RAW  # on link 2; where cut1 = cut2 the edge passes on what it gets, so it is codec1
    stations_s: StationSeconds  # predicted, at the placement's bandwidth

    @property
    def device_only(self) -> bool:
        """The device computes all layers: nothing crosses a link."""
        return not any(self.stations_s[1:])


class BatchLoad(Frozen):
    """The predicted batches of a node that computes the samples of several tasks together."""

    tasks: Annotated[int, Field(ge=1)]  # tasks with the same model on the node, this one included
    batch: Annotated[float, Field(ge=1)]  # mean samples in a batch
    apart: Annotated[float, Field(gt=0)]  # time between two samples of this task, in shares of a sample in its batch


class Placement(Frozen):
    """Where a task runs: layers 1..cut1 on the device, cut1+1..cut2 on the edge, the rest on the cloud.

    A placement of several routes has the cuts of the route with the largest share that is not on the device alone, and the
    kind of all tiers that compute.
    """

    kind: Kind  # the tiers that compute
    edge: NodeName | None = None  # the edge whose slot or links are used; None: the device computes everything
    cut1: Annotated[int, Field(ge=0)]  # last layer of the device
    cut2: Annotated[int, Field(ge=0)]  # last layer of the edge
    cut1_name: str  # that layer's name, "input" at 0
    cut2_name: str  # that layer's name, "input" at 0
    link1_bps: BitsPerSecond = 0  # b1, reserved between device and edge, 0 where unused
    link2_bps: BitsPerSecond = 0  # b2, reserved between edge and cloud, 0 where unused
    routes: Annotated[tuple[Route, ...], Field(min_length=1, max_length=MAX_ROUTES)] | None = (
        None  # by falling share; None: one route, cut1 and cut2, without codecs
    )
    edge_batch: BatchLoad | None = None  # None: the edge does not compute in batches
    cloud_batch: BatchLoad | None = None  # None: the cloud does not

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for cut1, cut2 in self.cut_pairs:
            if cut1 > cut2:
                raise ValueError(f"cut1 {cut1} is after cut2 {cut2}")
        if self.routes is not None and not math.isclose(sum(route.share for route in self.routes), 1.0, abs_tol=1e-6):
            raise ValueError("the shares of the routes do not sum to 1")
        if (self.edge is None) != (self.kind is Kind.DEVICE):
            raise ValueError(f"a placement of kind {self.kind} {'needs an' if self.edge is None else 'has no'} edge")
        return self

    @property
    def cut_pairs(self) -> tuple[tuple[int, int], ...]:
        """The cuts of each route."""
        if self.routes is None:
            return ((self.cut1, self.cut2),)
        return tuple((route.cut1, route.cut2) for route in self.routes)

    def apart(self, part: str) -> float:
        """Time between two samples at a part of the delay, over the busy time of one; other than 1 only with batches."""
        load = {"edge": self.edge_batch, "cloud": self.cloud_batch}.get(part)
        return 1.0 if load is None else load.apart

    @property
    def uses_device(self) -> bool:
        """The device computes layers."""
        return self.cut1 > 0 if self.routes is None else any(route.cut1 > 0 for route in self.routes)

    @property
    def uses_slot(self) -> bool:
        """z of (19): the edge computes."""
        return self.cut1 != self.cut2 if self.routes is None else any(cut1 != cut2 for cut1, cut2 in self.cut_pairs)

    @property
    def uses_link1(self) -> bool:
        """x of (17): the device sends data to the edge."""
        return self.edge is not None

    @property
    def uses_cloud(self) -> bool:
        """y of (18): the edge sends data to the cloud."""
        return "cloud" in self.kind.value


class TensorSpec(Frozen):
    """One tensor that crosses a cut."""

    name: str  # as in the model file
    dtype: Annotated[str, Field(max_length=16)]  # numpy's name, e.g. "float32"
    shape: tuple[Annotated[int, Field(ge=0, le=1 << 31)], ...]  # of one sample, batch dimension included
    scales: tuple[float, ...] = ()  # quantisation scales; empty if the tensor is not quantised
    zero_points: tuple[int, ...] = ()  # quantisation zero points, as many as scales
    quantized_dimension: int = 0  # the axis that per-channel scales belong to


class CutPoint(Frozen):
    """A position of a model, and the tensors that cross it."""

    position: Annotated[int, Field(ge=0)]  # 0..l
    name: str  # name of the layer before it, "input" at 0
    tensors: tuple[TensorSpec, ...]  # the live activations, in file order
    cut_bytes: Bytes  # G(position): bytes of one sample that cross
    cuttable: bool = True  # whether the model can be cut here
    reason: str = ""  # why it cannot be cut here
    work: Annotated[float, Field(ge=0)] = 0.0  # estimated multiply-accumulates of the layer before it


class ModelManifest(Frozen):
    """The public description of a model: its positions and the hash of its file."""

    model: Name  # the name that messages use
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of the file
    size_bytes: Bytes  # of the file
    cuts: Annotated[tuple[CutPoint, ...], Field(min_length=2)]  # positions 0..l in order

    @property
    def layers(self) -> int:
        """l, the number of layers."""
        return len(self.cuts) - 1

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if [cut.position for cut in self.cuts] != list(range(len(self.cuts))):
            raise ValueError("the positions are not 0..l in order")
        return self


MAX_LAYERS = 1_024
"""Maximum number of layers: the memory of the pipelined search grows with its square."""

MAX_MODEL_S = 1e6
"""Maximum time of one sample on a platform: about eleven days."""


Agreement = Annotated[float, Field(ge=0, le=1)]
"""How far lossy crossings keep a model's outputs, over its calibration samples.

With classes: the share of the samples whose best class stays the same. Without: 1 minus the relative error (root of the mean
square) of the output that differs most.
"""

MAX_CODEC_PROFILES = 512
"""Most measured codecs of one model: with them and its agreements, six models fit into an announcement."""

MAX_AGREEMENTS = 1_024
"""Most pairs of crossings of one model whose agreement is announced."""


class CodecProfile(Frozen):
    """One codec at one position, measured on a platform: per sample, as the mean over the calibration samples."""

    position: Annotated[int, Field(ge=0)]  # 0..l-1; a result crosses raw
    codec: Codec  # not raw, whose size is G(position) and which takes no time
    bytes: Bytes  # G(position, codec): encoded bytes of one sample that cross
    encode_s: SampleSeconds  # on the sending platform
    decode_s: SampleSeconds  # on the receiving platform
    agreement: Agreement | None = None  # if this is the only lossy crossing; None: not measured, or lossless


class PairAgreement(Frozen):
    """Agreement of a model whose activations cross two positions with lossy codecs: their errors compound."""

    position1: Annotated[int, Field(ge=0)]  # cut1
    codec1: Codec  # lossy, on link 1
    position2: Annotated[int, Field(ge=0)]  # cut2, after position1
    codec2: Codec  # lossy, on link 2
    agreement: Agreement  # measured


MAX_BATCH = 32
"""Most samples that are computed together."""


class BatchSpeed(Frozen):
    """How fast a platform computes several samples of a model together, layer by layer."""

    batch: Annotated[int, Field(ge=2, le=MAX_BATCH)]  # samples computed together
    factors: tuple[Annotated[float, Field(ge=0, le=100)], ...]  # time per sample over that of one alone: l factors


class ModelProfile(Frozen):
    """The speed of one platform with one model, per sample: a row of the paper's F, and G.

    `layer_s[j - 1]` is the time of layer j, so F(j) is the sum of the first j entries; `cut_bytes[p]` is G(p).
    """

    model: Name  # the name that messages use
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of the model file, or of the name if there is no file
    platform: str  # the measured platform, e.g. "device d1" or "paper/edge"
    layer_names: tuple[str, ...]  # l names
    layer_s: tuple[Seconds, ...]  # l times, scaled so that their sum is the time of the whole model
    cut_bytes: tuple[Bytes, ...]  # l + 1 sizes, G(0)..G(l)
    forbidden: tuple[int, ...] = ()  # positions that cannot be cut
    whole_s: Seconds | None = None  # time of the uncut model, if measured
    sum_of_slices_s: Seconds | None = None  # sum of the times of one-layer slices, before scaling
    codecs: Annotated[tuple[CodecProfile, ...], Field(max_length=MAX_CODEC_PROFILES)] | None = (
        None  # those worth using, by position; None: none measured
    )
    agreements: Annotated[tuple[PairAgreement, ...], Field(max_length=MAX_AGREEMENTS)] | None = (
        None  # of the measured pairs of lossy crossings; None: none measured
    )
    calibration_samples: Annotated[int, Field(ge=1)] | None = None  # behind each agreement; None: none
    accelerator: Literal["cpu", "gpu"] | None = None  # what computed in the measurement; None: the CPU
    not_on_gpu: Annotated[str, Field(max_length=300)] | None = (
        None  # why the platform's GPU does not compute the whole model; None: it does, or none is used
    )
    batch: Annotated[tuple[BatchSpeed, ...], Field(min_length=1, max_length=MAX_BATCH)] | None = (
        None  # by rising batch; None: the platform computes samples one by one
    )
    executors: Annotated[int, Field(ge=1, le=4096)] | None = None  # batches computed at the same time; None: one

    @property
    def layers(self) -> int:
        """l, the number of layers."""
        return len(self.layer_names)

    @model_validator(mode="after")
    def _matching(self) -> Self:
        layers = len(self.layer_names)
        if layers < 1 or len(self.layer_s) != layers or len(self.cut_bytes) != layers + 1:
            raise ValueError(
                f"{layers} names, {len(self.layer_s)} times and {len(self.cut_bytes)} sizes: must be l, l and l + 1"
            )
        if layers > MAX_LAYERS:
            raise ValueError(
                f"{self.model} has {layers:,} layers, the limit is {MAX_LAYERS:,}: combine several into one"
            )
        if not (total_s := sum(self.layer_s)) <= MAX_MODEL_S:
            raise ValueError(f"{self.model} takes {total_s:.3g} s for one sample, the limit is {MAX_MODEL_S:.0f} s")
        if any(not 0 < position < layers for position in self.forbidden):
            raise ValueError("only positions inside the model can be forbidden")
        return self

    @model_validator(mode="after")
    def _measured_codecs(self) -> Self:
        layers, codecs, pairs = len(self.layer_names), self.codecs or (), self.agreements or ()
        if any(one.codec is Codec.RAW or one.position >= layers for one in codecs):
            raise ValueError(f"a codec is raw, or not at a position from 0 to {layers - 1}")
        if len({(one.position, one.codec) for one in codecs}) < len(codecs):
            raise ValueError("a codec is given twice at a position")
        if any(pair.codec1.lossless or pair.codec2.lossless for pair in pairs):
            raise ValueError("an agreement of a pair needs two lossy codecs")
        if any(not pair.position1 < pair.position2 < layers for pair in pairs):
            raise ValueError(f"the positions of a pair are not rising, or not below {layers}")
        return self

    @model_validator(mode="after")
    def _measured_batches(self) -> Self:
        batches = self.batch or ()
        if any(one.batch >= other.batch for one, other in pairwise(batches)):
            raise ValueError("the sizes of the batches must rise")
        if any(len(one.factors) != len(self.layer_names) for one in batches):
            raise ValueError(f"a batch needs {len(self.layer_names)} factors, one for each layer")
        return self

    def together(self, samples: float) -> tuple[float, ...]:
        """The time of each layer for a batch of `samples`, divided by its time for one sample; at least 1.

        Between two measured batches the time is interpolated. More samples than the largest measured batch are computed in
        several ones. `samples`, at least 1, need not be whole: it may be a mean.
        """
        if not self.batch:
            return (float(samples),) * self.layers
        known = [(1, (1.0,) * self.layers)]
        known += [(one.batch, tuple(max(1.0, one.batch * factor) for factor in one.factors)) for one in self.batch]
        largest, times = known[-1]
        if samples >= largest:
            return tuple(time * samples / largest for time in times)
        at = bisect_right(known, samples, key=itemgetter(0))
        (low, low_times), (high, high_times) = known[at - 1 : at + 1]
        share = (samples - low) / (high - low)
        return tuple(one + share * (other - one) for one, other in zip(low_times, high_times, strict=True))

    def together_s(self, samples: int, first: int, last: int) -> float:
        """The time of layers first+1..last for a batch of `samples`."""
        times = self.together(samples)
        return sum(time * layer_s for time, layer_s in zip(times[first:last], self.layer_s[first:last], strict=True))

    def agreement(self, crossing1: tuple[int, Codec], crossing2: tuple[int, Codec]) -> float | None:
        """The agreement of a pair of cuts with the codec of each: 1.0 if both are lossless, None if it was not measured.

        Equal cuts are one crossing, with the codec of the first: the edge passes on what it gets. Nothing crosses at l.
        """
        crossings = (crossing1,) if crossing1[0] == crossing2[0] else (crossing1, crossing2)
        lossy = [one for one in crossings if not one[1].lossless and one[0] < self.layers]
        if not lossy:
            return 1.0
        if len(lossy) == 1:
            return next((one.agreement for one in self.codecs or () if (one.position, one.codec) == lossy[0]), None)
        return next(
            (
                pair.agreement
                for pair in self.agreements or ()
                if [(pair.position1, pair.codec1), (pair.position2, pair.codec2)] == lossy
            ),
            None,
        )

    def codec(self, position: int, codec: Codec) -> CodecProfile:
        """The measurement of a codec at a position; one that was not measured counts as raw."""
        found = (one for one in self.codecs or () if (one.position, one.codec) == (position, codec))
        raw = CodecProfile(position=position, codec=codec, bytes=self.cut_bytes[position], encode_s=0.0, decode_s=0.0)
        return next(found, raw)

    def slowed(self, factor: float) -> ModelProfile:
        """The profile of a machine that is `factor` times slower."""
        codecs = self.codecs and tuple(
            one.model_copy(update={"encode_s": factor * one.encode_s, "decode_s": factor * one.decode_s})
            for one in self.codecs
        )
        return self.model_copy(update={"layer_s": tuple(factor * one for one in self.layer_s), "codecs": codecs})

    def without_codecs(self) -> ModelProfile:
        """The profile as if no codecs had been measured."""
        return self.model_copy(update={"codecs": None, "agreements": None, "calibration_samples": None})

    def without_batches(self) -> ModelProfile:
        """The profile as if no batches had been measured."""
        return self.model_copy(update={"batch": None, "executors": None})

    def cut_name(self, position: int) -> str:
        """The name of the layer before `position`, "input" at 0."""
        return self.layer_names[position - 1] if position else "input"
