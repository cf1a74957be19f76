"""Whose frames a stage takes, by what it knows of the decisions at that moment."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from bus.errors import ProtocolError
from bus.frames import AttemptPlan, Frame
from bus.identity.keys import Master, Speaker
from bus.identity.signed_bus import signed
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import Admitted, Decision, Placed, SeedInput, TaskSubmitted
from bus.values import Execution, Kind, Objective, Parts, Placement, Role, Route
from stages.frame_authorization import FrameAuthorization
from stages.membership.fences import Fences
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import ModelledRunner
from tests.sim.world import profile

MASTER = Master(bytes(range(32)), frames=True)
WHERE = Placement(
    kind=Kind.CLOUD, edge="e1", cut1=0, cut2=0, cut1_name="input", cut2_name="input", link1_bps=1000, link2_bps=1000
)
TASK = TaskSubmitted(task_id="t", device="d1", model="toy", samples=2, input=SeedInput(seed=1))
PLACED = Placed(
    task_id="t", attempt=1, device="d1", model="toy", sha256="0" * 64, samples=2, policy="p", start_s=0.0, wait_s=0.0,
    objective=Objective.PIPELINED, execution=Execution.STREAMING, placement=WHERE, delay_s=1.0, parts=Parts(),
)  # fmt: skip
DECISION = Decision(
    region=0, epoch=1, nonce="n", seq=1, now_s=0.0, inputs={}, changes=(Admitted(task=TASK), PLACED), ledger_hash="h"
)


async def _stage(role: Role, name: str) -> tuple[Node, FrameAuthorization]:
    bus = signed(MemoryBus(MemoryBroker(), name), MASTER.key(Speaker(role.value, name)))
    slots: dict[str, Any] = {"slots": 1, "link1_capacity_bps": 1000, "link2_capacity_bps": 1000}
    settings = NodeSettings(name=name, role=role, **(slots if role is Role.EDGE else {}))
    node = Node(bus, settings, ModelledRunner([profile(role)]))
    return node, FrameAuthorization(node)


def _frame(attempt: int, plan: AttemptPlan | None = None) -> Frame:
    return Frame("activations", "t", attempt, "x", (), plan)


async def test_a_stage_that_begins_anew_with_the_decisions_believes_what_it_reads_then() -> None:
    """`RegionDecisions` takes fresh fences where a snapshot cannot be used."""
    node, authorization = await _stage(Role.EDGE, "e1")
    node.decisions.fences = Fences()
    node.fences.apply(DECISION)
    assert authorization.usable(Speaker("device", "d1"), _frame(1), None)
    assert authorization.may_send(Speaker("device", "d1"), "t")


async def test_a_task_of_this_region_is_no_other_region_s() -> None:
    """An edge that has no part in a task plants its next attempt at the cloud, as of another region."""
    node, authorization = await _stage(Role.CLOUD, "c1")
    stranger = Speaker("edge", "e2")
    theirs = WHERE.model_copy(update={"edge": "e2"})
    plan = AttemptPlan(
        task_id="t", attempt=2, region=9, device="d1", model="toy", sha256="0" * 64, samples=2, todo=2,
        execution="streaming", placement=theirs,
    )  # fmt: skip
    assert authorization.usable(stranger, _frame(2, plan), plan)  # a task of which this region has no decision
    node.fences.apply(DECISION)
    assert not authorization.usable(stranger, _frame(2, plan), plan)


@pytest.mark.parametrize(
    ("cuts", "may"), [(((0, 3), (1, 2)), True), (((0, 2), (1, 2)), False), (((3, 3), (1, 2)), False)]
)
async def test_the_edge_may_send_results_where_it_computes_the_last_layer_of_a_route(
    cuts: tuple[tuple[int, int], ...], may: bool
) -> None:
    _, authorization = await _stage(Role.DEVICE, "d1")
    routes = tuple(Route(cut1=a, cut2=b, share=1 / len(cuts), stations_s=(1.0,) * 7) for a, b in cuts)
    placement = WHERE.model_copy(update={"kind": Kind.DEVICE_EDGE_CLOUD, "routes": routes})
    plan = AttemptPlan.of(PLACED.model_copy(update={"placement": placement}), region=0, todo=2)
    authorization.check_result(Speaker("cloud", "c1"), Frame("result", "t", 1, "c1"), plan)
    authorization.check_result(Speaker("edge", "e1"), Frame("report", "t", 1, "e1"), plan)
    with contextlib.nullcontext() if may else pytest.raises(ProtocolError, match="does not authorize"):
        authorization.check_result(Speaker("edge", "e1"), Frame("result", "t", 1, "e1"), plan)
