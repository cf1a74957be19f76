"""The values that messages carry: what a model looks like, how fast a platform runs it, where a task is placed.

All are frozen and validated when built. Times are seconds, rates bits per second, sizes bytes; positions count the cuts
0..l of a model with l layers: position p lies after layer p, 0 is before the first layer, l after the last.
"""

from __future__ import annotations

import re
from enum import StrEnum
from itertools import product
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bus.errors import ConfigError

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+/:-]*$")]
"""A node, task or model name: printable, without blanks, safe in a topic name but for `/`, `:` and `+`."""

_NODE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
NodeName = Annotated[str, Field(min_length=1, max_length=100, pattern=_NODE_NAME)]
"""A node's name becomes part of topic names, so it holds letters, digits, `_` and `-` only."""

Seconds = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
"""A span of time; sums and products of a few of them stay finite."""

Bytes = Annotated[int, Field(ge=0, le=1 << 40)]
BitsPerSecond = Annotated[int, Field(ge=0, le=1 << 50)]

BITS_PER_BYTE = 8
"""The one place where bytes become bits."""


def is_node_name(text: str) -> bool:
    """Whether a text, for example from a frame, can be a node's name."""
    return len(text) <= 100 and re.match(_NODE_NAME, text) is not None and not text.endswith("\n")


class Frozen(BaseModel):
    """A value: equal by content, never changed. Unknown keys are ignored, so that newer writers can be read."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Role(StrEnum):
    """What a node does for a task."""

    DEVICE = "device"
    EDGE = "edge"
    CLOUD = "cloud"


class Kind(StrEnum):
    """Which tiers compute. The last three are those before with cut1 = 0: the device only sends its input."""

    DEVICE = "device"
    DEVICE_EDGE = "device+edge"
    DEVICE_CLOUD = "device+cloud"
    DEVICE_EDGE_CLOUD = "device+edge+cloud"
    EDGE = "edge"
    EDGE_CLOUD = "edge+cloud"
    CLOUD = "cloud"

    @classmethod
    def of(cls, cut1: int, cut2: int, layers: int) -> Kind:
        """The kind that the cuts imply, by the indicators x, y, z of (17)-(19)."""
        if cut1 == layers:
            return cls.DEVICE
        return _KIND_OF[cut1 > 0, cut1 != cut2, cut2 != layers]


_KIND_OF = {
    computing: Kind(
        "+".join(tier for tier, computes in zip(("device", "edge", "cloud"), computing, strict=True) if computes)
    )
    for computing in product((False, True), repeat=3)
    if any(computing)
}


class Objective(StrEnum):
    """What the planner minimises: (7), the sum of all parts, or the makespan of a stream of samples."""

    SEQUENTIAL = "sequential"
    PIPELINED = "pipelined"

    @property
    def execution(self) -> Execution:
        """What the stages do where this is what was planned for."""
        return Execution.STREAMING if self is Objective.PIPELINED else Execution.SEQUENTIAL

    def executed_as(self, execution: Execution | None) -> Execution:
        """What the stages do: what goes with this. Raises `ConfigError` where something else is asked for."""
        if execution not in (None, self.execution):
            raise ConfigError(f"objective {self} goes with execution {self.execution}, not {execution}")
        return self.execution


class Execution(StrEnum):
    """What the stages do: one sample at a time (the paper's), or all stations busy at once."""

    SEQUENTIAL = "sequential"
    STREAMING = "streaming"


class Parts(Frozen):
    """The delay parts (1)-(6) of one task, busy seconds summed over all its samples."""

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


DELAY_PARTS: Final = tuple(field.removesuffix("_s") for field in Parts.model_fields)
"""The names of the parts, in the order in which a sample passes them: device, link1, ..., result."""

STATIONS: Final = DELAY_PARTS[:-1]
"""The parts that a sample passes on its way to the last layer: all but the return of the result."""


class Placement(Frozen):
    """Where a task runs: the device 1..cut1, the edge cut1+1..cut2, the cloud the rest."""

    kind: Kind  # the tiers that compute
    edge: NodeName | None = None  # the edge whose slot or links are used; None on the device alone
    cut1: Annotated[int, Field(ge=0)]  # last layer of the device
    cut2: Annotated[int, Field(ge=0)]  # last layer of the edge
    cut1_name: str  # that layer's name, "input" at 0
    cut2_name: str  # that layer's name, "input" at 0
    link1_bps: BitsPerSecond = 0  # b1, reserved between device and edge, 0 where unused
    link2_bps: BitsPerSecond = 0  # b2, reserved between edge and cloud, 0 where unused

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.cut1 > self.cut2:
            raise ValueError(f"cut1 {self.cut1} lies behind cut2 {self.cut2}")
        if (self.edge is None) != (self.kind is Kind.DEVICE):
            raise ValueError(f"a placement of kind {self.kind} {'needs an' if self.edge is None else 'has no'} edge")
        return self

    @property
    def uses_slot(self) -> bool:
        """z of (19): the edge computes."""
        return self.cut1 != self.cut2

    @property
    def uses_link1(self) -> bool:
        """x of (17): something crosses from the device to the edge."""
        return self.edge is not None

    @property
    def uses_cloud(self) -> bool:
        """y of (18): something crosses from the edge to the cloud."""
        return "cloud" in self.kind.value


class TensorSpec(Frozen):
    """One tensor that crosses a cut."""

    name: str  # as in the model file
    dtype: Annotated[str, Field(max_length=16)]  # numpy's name, e.g. "float32"
    shape: tuple[Annotated[int, Field(ge=0, le=1 << 31)], ...]  # of one sample, batch dimension included
    scales: tuple[float, ...] = ()  # quantisation scales, empty where the tensor is not quantised
    zero_points: tuple[int, ...] = ()  # quantisation zero points, as many as scales
    quantized_dimension: int = 0  # the axis that per-channel scales belong to


class CutPoint(Frozen):
    """A position at which a model may be cut, and what crosses it."""

    position: Annotated[int, Field(ge=0)]  # 0..l
    name: str  # of the layer before it, "input" at 0
    tensors: tuple[TensorSpec, ...]  # the live activations, in file order
    cut_bytes: Bytes  # G(position): bytes of one sample that cross
    cuttable: bool = True  # whether slices can be made here
    reason: str = ""  # why not, where not
    work: Annotated[float, Field(ge=0)] = 0.0  # of the layer before it, in multiply-accumulates (an estimate)


class ModelManifest(Frozen):
    """What one model looks like from outside: its positions, and the hash that pins its bytes."""

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
"""The pipelined search looks at every pair of cuts, and its memory grows with the square of this."""

MAX_MODEL_S = 1e6
"""The longest that one sample may take on a platform: eleven days."""


class ModelProfile(Frozen):
    """How one platform runs one model: a row of F and G of the paper, for one sample.

    `layer_s[j - 1]` is the time of layer j, so F(j) is the sum of the first j entries; `cut_bytes[p]` is G(p).
    """

    model: Name  # the name that messages use
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # of the model file; of the name where there is no file
    platform: str  # who measured, e.g. "device d1", "paper/edge"
    layer_names: tuple[str, ...]  # l names
    layer_s: tuple[Seconds, ...]  # l times, scaled so that they add up to the whole
    cut_bytes: tuple[Bytes, ...]  # l + 1 sizes, G(0)..G(l)
    forbidden: tuple[int, ...] = ()  # positions that cannot be cut
    whole_s: Seconds | None = None  # the whole model in one piece, where it was measured
    sum_of_slices_s: Seconds | None = None  # the one-layer slices added up, before scaling

    @property
    def layers(self) -> int:
        """l, the number of layers."""
        return len(self.layer_names)

    @model_validator(mode="after")
    def _matching(self) -> Self:
        layers = len(self.layer_names)
        if layers < 1 or len(self.layer_s) != layers or len(self.cut_bytes) != layers + 1:
            raise ValueError(
                f"{layers} names, {len(self.layer_s)} times and {len(self.cut_bytes)} sizes do not belong together"
            )
        if layers > MAX_LAYERS:
            raise ValueError(f"{self.model} has {layers:,} layers, over {MAX_LAYERS:,}: take several as one")
        if not (total_s := sum(self.layer_s)) <= MAX_MODEL_S:
            raise ValueError(f"{self.model} takes {total_s:.3g} s for one sample, over {MAX_MODEL_S:.0f} s")
        if any(not 0 < position < layers for position in self.forbidden):
            raise ValueError("only positions inside the model can be forbidden")
        return self

    def cut_name(self, position: int) -> str:
        """The name of the layer before `position`, "input" at 0."""
        return self.layer_names[position - 1] if position else "input"
