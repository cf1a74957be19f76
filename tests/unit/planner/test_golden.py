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
    ("deepar", "sequential"): "c5607738759e92fe66d4fddcac4325bd1824410c609987cf82a1a295083bfb0f",
    ("deepar", "pipelined"): "44dc1695992b3ee595dc4bc9f4546aeb7c4e9b8d51c237a7b4a13e65ca0666a7",
    ("no-delay", "sequential"): "181c89030969ea2072343374db1b593e1941ba066044d996d0da45cba201e3a7",
    ("no-delay", "pipelined"): "55d8208d429fd985c9152dd7935f861c759a6b2077050ba59e149fa385aabf6e",
    ("device-only", "sequential"): "f04af88c5cce458d36b91a4f8f1d1858608892f405a523dd87be2dc39c3de6b4",
    ("device-only", "pipelined"): "bc2b9e56cd074d48ff758d23d8cb3ea16da0378751230c492d4587dc413dffde",
    ("edge-only", "sequential"): "d2cb7995bf2b8e764df5247c65920e594597d9236257f3fcbc0eaa5271789be2",
    ("edge-only", "pipelined"): "bb79d28680c2d03fbf57bfe86fc5891626787c654f4f7f6e4c0e5de170a91d27",
    ("cloud-only", "sequential"): "6d4cb1e0859d8ff5260d88a59ebb5d6d9a290ebd6a7a67b978456537dfcc3a5a",
    ("cloud-only", "pipelined"): "d606e16fcacedfc8cb4bf704dcccad7a237f7d337f349123616445b9bba59d3d",
    ("neurosurgeon", "sequential"): "7f0b8403dfe0552ea26f28352839c5036583fa5790a1fd4d7577e92e003e5704",
    ("neurosurgeon", "pipelined"): "711145e46419c03c97c67a269acea448c9a48a3aa3ad0a4843bc998c6d446268",
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
    assert len(kinds) == 11  # every kind of change there is
