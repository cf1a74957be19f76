"""Whose frames a stage takes, where the region demands that frames are proven (`bus.identity.frame_keys`); else everybody's.

A proof says who has sent a frame. Whether that one may send frames of a task, the decisions say: the task's device sends to
the edge of its placement, that edge to the cloud, edge or cloud to the device. So a frame of a task that is not decided yet,
as far as is known here, waits for the decision, also if it brings a plan. What a frame itself says of its sender (`from`) is
not looked at.
"""

from __future__ import annotations

from bus.frames import Frame, Plan
from bus.identity.proofs import Speaker, refused
from bus.identity.signed_bus import frame_keys
from bus.messages import Placed
from bus.port import Record
from bus.values import Role
from stages.node import Node


class FrameAuthorization:
    """What one stage believes."""

    def __init__(self, node: Node) -> None:
        self._keys = frame_keys(node.bus)
        self._settings = node.settings
        self._node = node  # whose fences are replaced where a snapshot cannot be used

    def of(self, record: Record) -> Speaker | None:
        """Who has sent a frame; None where nobody has to prove it. Raises `ProtocolError` (`wrong_identity`)."""
        return None if self._keys is None else self._keys.sender(record)

    def may_send(self, sender: Speaker | None, task_id: str) -> bool:
        """Whether frames of a task are that sender's to send, as far as is decided."""
        if sender is None:
            return True
        placed = self._node.fences.placed.get(task_id)
        return placed is not None and sender.name == self._owner(placed)

    def believed(self, sender: Speaker | None, frame: Frame, plan: Plan | None) -> bool:
        """Whether a frame of activations can be used now; False: it waits for the decision on its task.

        `plan`: the one that is followed for it here, else the one that it brings. Raises `ProtocolError`
        (`wrong_identity`) where the sender may not send it.
        """
        if sender is None:
            return True
        fences = self._node.fences
        placed = fences.placed.get(frame.task_id)
        if placed is None or placed.attempt != frame.attempt:
            # A cloud stage does not read the decisions of other regions; a task of its own is no other region's.
            foreign = plan is not None and plan.region != self._settings.region and frame.task_id not in fences.tasks
            return (
                foreign
                and self._settings.role is Role.CLOUD
                and plan is not None
                and sender.name == plan.placement.edge
            )
        if sender.name != self._owner(placed):
            raise refused(f"{sender} sends a frame of {frame.task_id}, in which that is {self._owner(placed)}'s to do")
        told = frame.plan
        if told is not None and told != Plan.of(
            placed, region=self._settings.region, todo=told.todo, input_bytes=told.input_bytes
        ):
            raise refused(f"{sender} brings a plan for {frame.task_id} that is not the one decided")
        return True

    def check_result(self, sender: Speaker | None, frame: Frame, plan: Plan) -> None:
        """Whether a result or a report comes from who works on the task. Raises `ProtocolError` (`wrong_identity`)."""
        if sender is None:
            return
        placement = plan.placement
        by_edge = sender.role == Role.EDGE.value and sender.name == placement.edge
        by_cloud = sender.role == Role.CLOUD.value and placement.uses_cloud
        if frame.kind != "report":  # both report; the last one of them has the results
            by_edge = by_edge and not placement.uses_cloud
        if frame.source != sender.name or not (by_edge or by_cloud):
            raise refused(
                f"{sender} sends a {frame.kind} of {frame.task_id} as {frame.source}, which is not its to send"
            )

    def _owner(self, placed: Placed) -> str | None:
        """Who sends this stage the frames of a task."""
        return placed.device if self._settings.role is Role.EDGE else placed.placement.edge


__all__ = ["FrameAuthorization"]
