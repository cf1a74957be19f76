"""The decisions of some thousand random tasks, and the hashes after them, as they were recorded on 2026-11-27.

Whoever makes the planner faster must not change what it decides, nor the bytes that say so. A digest is over the records as
they stand on the topic: every change, in order, with the hash of the state after it. One that must change, because the
planner is to decide otherwise, is printed by the test that fails.
"""

from hashlib import sha256

import pytest

from bus import messages
from bus.messages import Change
from bus.values import Objective
from planner.core import PlannerCore
from tests.unit.planner.scenes import World

WORLDS = (
    {"rate": 1.0},
    {"rate": 3.0, "orderly": True},
    {"rate": 6.0, "edges": 6, "devices": 30, "reach": 3},
)
SEEDS = 2
TASKS = 150

RECORDED = {
    ("deepar", "sequential"): "fee9945c5203527b0028190704523d1f87b5b864c67b48c47816ddb37bc62e7b",
    ("deepar", "pipelined"): "26da47a19c260fee0e1c8967392120d0b2536714dcccd54147ed3d960a265967",
    ("no-delay", "sequential"): "978d9ad8209fee39d230d05e417a1f14ddfa818ba91cac75283920c4f65caf48",
    ("no-delay", "pipelined"): "c3e4b5443d2980ceec26acdbb5914a29f2561937669ce4e9adacc5fcc12d98fd",
    ("device-only", "sequential"): "189cd7664809a3ec0cce05f1c5fdbe65f0c6a1ce55361259ec4d62611142457a",
    ("device-only", "pipelined"): "b493c39b6546fe785dc75b3095b0bd5ed82bbc1ca80e39affef5c8e70dd42ca1",
    ("edge-only", "sequential"): "ae569b8ec1e9539c34a5d8ee11d0ce7885670139747b854957542cd9410dd987",
    ("edge-only", "pipelined"): "15fd95f2a7f0f3654b8c11d268f32be084da57ba6b6bc5e03d27fec7492946e7",
    ("cloud-only", "sequential"): "528bdc6e460cdc4780b796f92f501b1696ccdb887d5a10b535933149fceee765",
    ("cloud-only", "pipelined"): "12115d02c4cbc55eba9e773ecc8cbfc0df2c56d9d3c49cf1e820fd252f547973",
    ("neurosurgeon", "sequential"): "349cc7eae4f705227b7285aec1cc66b8252d2ba0802a09abfae5cc578c81ebb5",
    ("neurosurgeon", "pipelined"): "ee447038e2f3f2ff4b49958e44b1886ce20b6a57aa5a5afe39d0079cdeba92de",
}


@pytest.mark.parametrize(("policy", "objective"), RECORDED)
def test_what_is_decided_has_not_changed(policy: str, objective: str) -> None:
    digest = sha256()
    for seed in range(SEEDS):
        for settings in WORLDS:
            core = PlannerCore(0, policy, Objective(objective))
            world = World(core, seed, tasks=TASKS, validate=False, **settings).run()  # type: ignore[arg-type]
            for decision in world.log:
                digest.update(messages.encode(decision))
    assert digest.hexdigest() == RECORDED[policy, objective]


@pytest.mark.parametrize("objective", list(Objective))
def test_what_the_core_builds_unchecked_is_what_validation_would_build(objective: Objective) -> None:
    kinds: set[type[Change]] = set()
    for policy in ("deepar", "cloud-only"):
        for decision in World(PlannerCore(0, policy, objective), 3, rate=4.0, validate=False).run().log:
            for change in decision.changes:
                checked = type(change).model_validate_json(change.model_dump_json())
                assert checked == change
                assert checked.model_dump_json() == change.model_dump_json()
                kinds.add(type(change))
    assert len(kinds) == 10  # every kind of change there is
