"""Authorization of frames: which sender may send frames of which task.

It applies where the region requires proofs of identity (`bus.identity.frame_keys`); elsewhere every frame is accepted. The
proof names the sender of a frame. The planner's decisions name the authorized one: the task's device sends to the edge of its
placement, that edge to the cloud, and edge or cloud to the device. A frame whose decision has not arrived yet is buffered,
even if it carries a plan. For activations, the frame's own `from` field is ignored.
"""

from __future__ import annotations

from bus.frames import AttemptPlan, Frame
from bus.identity.proofs import Speaker, refused
from bus.identity.signed_bus import frame_keys
from bus.messages import Placed
from bus.port import Record
from bus.values import Role
from stages.node import Node


class FrameAuthorization:
    """Checks the senders of the frames that one stage receives."""

    def __init__(self, node: Node) -> None:
        self._keys = frame_keys(node.bus)
        self._settings = node.settings
        self._node = node  # kept instead of its fences, because the node may replace those

    def of(self, record: Record) -> Speaker | None:
        """The proven sender of a frame; None where no proof is required. Raises `ProtocolError` (`wrong_identity`)."""
        return None if self._keys is None else self._keys.sender(record)

    def may_send(self, sender: Speaker | None, task_id: str) -> bool:
        """Whether the decisions read so far authorize the sender to send frames of the task."""
        if sender is None:
            return True
        placed = self._node.fences.placed(task_id)
        return placed is not None and str(sender) == self._owner(placed)

    def can_sign(self, topic: str) -> bool:
        """Whether frames that this stage sends on a topic carry the proof that is required there."""
        return self._keys is None or self._keys.signs(topic)

    def check_probe(self, sender: Speaker | None, frame: Frame) -> None:
        """Check that the node named in a probe or an echo sent it. Raises `ProtocolError` (`wrong_identity`)."""
        if sender is None:
            return
        role = _PROBERS.get(self._settings.role) if frame.kind == "probe" else _ECHOERS.get(self._settings.role)
        if role is None or sender.role != role.value or sender.name != frame.source:
            raise refused(f"{sender} sent a frame of kind {frame.kind} as {frame.source}; it may not")

    def usable(self, sender: Speaker | None, frame: Frame, plan: AttemptPlan | None) -> bool:
        """Whether a frame of activations can be used now; False means it waits for the decision on its task.

        `plan` is the plan that this stage follows for the task, else the plan in the frame. Raises `ProtocolError`
        (`wrong_identity`) where the sender is unauthorized.
        """
        if sender is None:
            return True
        fences = self._node.fences
        placed = fences.revised(frame.task_id, frame.attempt, frame.revision)
        if placed is None:
            # A cloud stage reads its own region's decisions only, so it accepts unknown tasks of other regions.
            foreign = plan is not None and plan.region != self._settings.region and frame.task_id not in fences.tasks
            return (
                foreign
                and self._settings.role is Role.CLOUD
                and plan is not None
                and sender.name == plan.placement.edge
            )
        if str(sender) != self._owner(placed):
            raise refused(f"{sender} sent a frame of {frame.task_id}; only {self._owner(placed)} may send it")
        claimed = frame.plan
        if claimed is not None and claimed != AttemptPlan.of(
            placed, region=self._settings.region, todo=claimed.todo, input_bytes=claimed.input_bytes
        ):
            raise refused(f"{sender} sent a plan for {frame.task_id} that differs from the planner's decision")
        return True

    def check_result(self, sender: Speaker | None, frame: Frame, plan: AttemptPlan) -> None:
        """Check that a stage of the plan sent this result or report. Raises `ProtocolError` (`wrong_identity`)."""
        if sender is None:
            return
        placement = plan.placement
        by_edge = sender.role == Role.EDGE.value and sender.name == placement.edge
        by_cloud = sender.role == Role.CLOUD.value and placement.uses_cloud
        if frame.kind != "report":  # both stages send reports; only the last one of a route sends results
            by_edge = by_edge and self._ends_at_edge(plan)
        if frame.source != sender.name or not (by_edge or by_cloud):
            raise refused(
                f"{sender} sent a {frame.kind} of {frame.task_id} as {frame.source}; the plan does not authorize it"
            )

    def _ends_at_edge(self, plan: AttemptPlan) -> bool:
        """Whether the edge computes the last layer on some route."""
        placement = plan.placement
        if not placement.uses_cloud:
            return True
        layers = next((p.layers for p in self._node.runner.profiles() if p.model == plan.model), None)
        return any(cut1 < cut2 == layers for cut1, cut2 in placement.cut_pairs)

    def _owner(self, placed: Placed) -> str:
        """Role and name of the node that sends the task's frames to this stage."""
        return f"device:{placed.device}" if self._settings.role is Role.EDGE else f"edge:{placed.placement.edge}"


_PROBERS = {Role.EDGE: Role.DEVICE, Role.CLOUD: Role.EDGE}
"""Which role may probe a stage of each role."""
_ECHOERS = {Role.DEVICE: Role.EDGE, Role.EDGE: Role.CLOUD}
"""Which role answers the probes of each role."""


__all__ = ["FrameAuthorization"]
