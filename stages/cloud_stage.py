"""What sets the cloud apart from an edge: no slots, the last layers of a model, and results for the device.

The cloud's links have no capacity of their own: a task's results cross both links at the rates that the task was granted.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractAsyncContextManager

from bus import topics
from bus.errors import ProtocolError
from bus.frames import AttemptPlan
from bus.values import Placement
from stages.flow import LayerRange
from stages.network.frame_sender import Route
from stages.network.played import NO_NETWORK, PlayedNetwork
from stages.network.shaper import Link


class CloudStage:
    """The cloud's side of a hop (`stages.flow.HopStage`)."""

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

    def layers(self, plan: AttemptPlan) -> LayerRange:
        """The layers after the plan's second cut. Raises `ProtocolError` where the plan does not use the cloud."""
        if not plan.placement.uses_cloud:
            raise ProtocolError("wrong_shape", f"task {plan.task_id}: the plan does not use the cloud")
        return LayerRange(plan.placement.cut2, None, computes=True)

    def serves(self, placement: Placement) -> LayerRange | None:
        """The layers that a placement has for the cloud; None where it does not use the cloud."""
        return LayerRange(placement.cut2, None, computes=True) if placement.uses_cloud else None

    def echo_topic(self, prober: str) -> str:
        """Answers to an edge's probes go to its own topic. Raises ValueError for a reserved name."""
        return topics.activations_topic(prober)

    def route(self, plan: AttemptPlan) -> Route:
        """To the device: over link 2, then over link 1."""
        placement = plan.placement
        grants = (self._link2.grant(placement.link2_bps), self._link1.grant(placement.link1_bps))
        return Route("result", topics.RESULTS, plan.device, "result", grants)

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Bytes sent over each link, by metric name."""
        return {"link1_bytes": self._link1.sent_bytes, "link2_bytes": self._link2.sent_bytes}
