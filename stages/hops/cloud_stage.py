"""What sets the cloud apart from an edge: no slots, the last layers of a model, and results for the device.

The cloud's links have no capacity of their own: a task's results cross both links at the rates that the task was granted.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractAsyncContextManager

from bus import topics
from bus.frames import AttemptPlan
from bus.values import MAX_LAYERS, Placement
from stages.computing import Segment
from stages.network.frame_sender import Destination
from stages.network.played import NO_NETWORK, PlayedNetwork
from stages.network.shaper import Link


class CloudStage:
    """The cloud's side of a hop (`stages.hops.flow.HopStage`)."""

    part = "cloud"

    def __init__(self, network: PlayedNetwork = NO_NETWORK) -> None:
        self.topic = topics.ACTIVATIONS_CLOUD
        self.group_id = topics.CLOUD_GROUP
        self._link2 = Link(network=network)  # in the direction of the devices, as link 1
        self._link1 = Link()
        self.probed_link = None  # the cloud probes nothing
        self.throughput = None  # and sends no activations
        self.echo_link = self._link2

    def slot(self) -> AbstractAsyncContextManager[None]:
        """Nothing to wait for: the planner does not limit how many tasks the cloud computes at once."""
        return contextlib.nullcontext()

    def segment(self, cut1: int, cut2: int, layers: int | None) -> Segment | None:
        """The layers after the second cut; None where there are none."""
        last = MAX_LAYERS + 1 if layers is None else layers  # of a model that is unknown here, so nothing is computed
        return None if cut2 == last else Segment(cut2, last)

    def serves(self, placement: Placement) -> bool:
        """Whether a placement uses the cloud."""
        return placement.uses_cloud

    def echo_topic(self, prober: str) -> str:
        """Answers to an edge's probes go to its own topic. Raises ValueError for a reserved name."""
        return topics.activations_topic(prober)

    def destination(self, plan: AttemptPlan, *, to_cloud: bool) -> Destination:
        """To the device: over link 2, then over link 1."""
        placement = plan.placement
        grants = (self._link2.grant(placement.link2_bps), self._link1.grant(placement.link1_bps))
        return Destination("result", topics.RESULTS, plan.device, "result", grants)

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Bytes sent over each link, by metric name."""
        return {"link1_bytes": self._link1.sent_bytes, "link2_bytes": self._link2.sent_bytes}
