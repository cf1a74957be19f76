"""The configuration of a node, and its announcement to the region."""

from __future__ import annotations

from dataclasses import dataclass

from bus.messages import NodeAnnounced
from bus.values import ModelProfile, Role
from stages.membership.fences import REMEMBERED_ENDS
from stages.network.played import NO_NETWORK, PlayedNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """Configuration of a node; validated again when the node announces itself."""

    name: str
    role: Role
    region: int = 0
    lease_s: float = 10.0
    slots: int = 0  # compute slots of an edge (r_e)
    link1_capacity_bps: int = 0  # of an edge (B_e^1) or of a device; 0: unlimited
    link2_capacity_bps: int = 0  # of an edge (B_e^2); 0: unlimited
    network: PlayedNetwork = NO_NETWORK  # the network that the node plays on its own link
    reachable_edges: tuple[str, ...] | None = None  # of a device (E_i); None: all edges
    remembered_ends: int = REMEMBERED_ENDS  # number of ended tasks remembered, to drop their late frames
    probes: bool = False  # measure the latency of links with probes
    rehearses: bool = False  # run each model once in memory before it announces itself, and rarely while idle

    def announcement(self, incarnation: str, models: tuple[ModelProfile, ...], *, draining: bool) -> NodeAnnounced:
        """What this node announces under an incarnation, with these profiles."""
        latency_s = self.network.mean_latency_s or None
        return NodeAnnounced(
            node=self.name,
            role=self.role,
            region=self.region,
            incarnation=incarnation,
            lease_s=self.lease_s,
            slots=self.slots,
            link1_capacity_bps=self.link1_capacity_bps,
            link2_capacity_bps=self.link2_capacity_bps,
            link1_latency_s=latency_s if self.role is Role.DEVICE else None,
            link2_latency_s=latency_s if self.role is not Role.DEVICE else None,
            reachable_edges=self.reachable_edges,
            models=models,
            draining=True if draining else None,
        )
