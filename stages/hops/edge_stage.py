"""What sets an edge apart from the cloud: its slots, its layers, and where its outputs go.

An edge computes layers cut1+1..cut2, or only relays where the plan has no layers for it. Its outputs go to the cloud over
link 2, or back to the device over link 1 where the plan ends on the edge.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

from bus import topics
from bus.frames import AttemptPlan
from bus.values import Placement
from stages.computing import Segment
from stages.measuring.throughput import LinkThroughput
from stages.membership.settings import NodeSettings
from stages.network.frame_sender import Destination
from stages.network.shaper import Link


class EdgeStage:
    """The edge's side of a hop (`stages.hops.flow.HopStage`)."""

    part = "edge"

    def __init__(self, settings: NodeSettings) -> None:
        self._name = settings.name
        self.topic = topics.activations_topic(settings.name)
        self.group_id = f"deepar.edge.{settings.name}"
        self.slots = asyncio.Semaphore(settings.slots)
        self._link2 = Link(settings.link2_capacity_bps, settings.network)
        self._results = Link(settings.link1_capacity_bps)  # link 1 in the direction of the device
        self.probed_link = self._link2
        self.throughput = LinkThroughput()  # of link 2
        self.echo_link = self._results

    def slot(self) -> AbstractAsyncContextManager[None]:
        """A compute slot, held while the block runs."""
        return self.slots

    def segment(self, cut1: int, cut2: int, layers: int | None) -> Segment | None:
        """The layers between the two cuts; None where the device computes all."""
        return None if cut1 == layers else Segment(cut1, cut2)

    def serves(self, placement: Placement) -> bool:
        """Whether a placement uses this edge."""
        return placement.edge == self._name

    def echo_topic(self, prober: str) -> str:
        """Answers to a device's probes go where its results go."""
        return topics.RESULTS

    def destination(self, plan: AttemptPlan, *, to_cloud: bool) -> Destination:
        """To the cloud, or back to the device."""
        placement = plan.placement
        if to_cloud:
            grants = (self._link2.grant(placement.link2_bps),)
            return Destination("link2", topics.ACTIVATIONS_CLOUD, plan.task_id, "activations", grants)
        return Destination("result", topics.RESULTS, plan.device, "result", (self._results.grant(placement.link1_bps),))

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Bytes sent over each link, by metric name."""
        return {"link1_bytes": self._results.sent_bytes, "link2_bytes": self._link2.sent_bytes}
