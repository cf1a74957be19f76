"""The decisions of some thousand random tasks, and the hashes after them, as they were recorded on 2026-11-25.

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
    ("deepar", "sequential"): "b12c2dcf5f6967933ec643953fbbf907df41e9c8fceafb7856a4baf5ba3aed7c",
    ("deepar", "pipelined"): "b73f20f13bbfeaff8b7541f36b2b2ba070c2aefe9fa36a07d6d33cc586aa22da",
    ("no-delay", "sequential"): "2a1f4aedf1dcc8eb5721893d5bd285dd1974873eff8bd918839c0613982290c2",
    ("no-delay", "pipelined"): "57d4fc35f5ec1d7985b3eab5178d8a1fa14457b32224125d90d20cc9648a79da",
    ("device-only", "sequential"): "ac8df8f7cb9b624175c92390b963b8ae8a67f039dfe878706123489c67e5a560",
    ("device-only", "pipelined"): "c058a76343aa60fe8cb6dbf4257511aa3dc5dc7fd14998b2afaaaffa383b4f58",
    ("edge-only", "sequential"): "376bb9930bd81688a5d71cf49662e3b96d7b2b0fa5ac5e41aa1f986e631ee140",
    ("edge-only", "pipelined"): "52c8799f7df08928baf72ca2df6afe418233cd82352f8ce36cac6da937655eb6",
    ("cloud-only", "sequential"): "74946e16400b56022b3869cafad96d0aeafe699949c2ded8138b3c15505daada",
    ("cloud-only", "pipelined"): "2e5c0b92af6c13dd2954093230259e6ed5f4fee6768e0327f23147bf3def51bc",
    ("neurosurgeon", "sequential"): "94129a5c3464093aadcb320b2cb7a9d00c950663cb60a4631fe0336367be8e58",
    ("neurosurgeon", "pipelined"): "5af185742c2b17bb16ad891435ce3b36f57558cda0837dfa892008e7f4d396b7",
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
