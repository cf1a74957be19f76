"""The decisions of some thousand random tasks, and the hashes after them, as they were recorded on 2026-11-27.

A change that makes the planner faster must change neither its decisions nor their bytes. A digest covers the records as they
are on the topic: every change, in order, with the hash of the state after it. If they change on purpose, the failing test
prints the new digest.
"""

from hashlib import sha256

import pytest

from bus import messages
from bus.messages import Change
from bus.values import Objective
from planner.core.core import PlannerCore
from tests.unit.planner.scenes import RandomRegion, Traffic

TASKS = 150
TRAFFIC = (
    Traffic(tasks=TASKS, rate=1.0),
    Traffic(tasks=TASKS, rate=3.0, orderly=True),
    Traffic(tasks=TASKS, rate=6.0, edges=6, devices=30, reach=3),
)
SEEDS = 2

RECORDED = {
    ("deepar", "sequential"): "30186cce3c0eeca78b21a9d77ae2a151d2d68169ade0e8d528b8f41395656d0f",
    ("deepar", "pipelined"): "9448adb60c61c7951e3b9371e7d01ada898cd7c9c72a2fd6ee3e463fa29000d5",
    ("no-delay", "sequential"): "181c89030969ea2072343374db1b593e1941ba066044d996d0da45cba201e3a7",
    ("no-delay", "pipelined"): "55d8208d429fd985c9152dd7935f861c759a6b2077050ba59e149fa385aabf6e",
    ("device-only", "sequential"): "f04af88c5cce458d36b91a4f8f1d1858608892f405a523dd87be2dc39c3de6b4",
    ("device-only", "pipelined"): "bc2b9e56cd074d48ff758d23d8cb3ea16da0378751230c492d4587dc413dffde",
    ("edge-only", "sequential"): "72618631e0439d8c59021c114404e47f7062777ff66d6089e3e62f5c5cec75b1",
    ("edge-only", "pipelined"): "b792043ad38ec96389ac954b7b2b01f99e45f8a61d67459aef5aa0124d015e6b",
    ("cloud-only", "sequential"): "3b2c060462168fcf536135d53cd733d633ba0bf0580eb6303c3e5e7ba47d63d3",
    ("cloud-only", "pipelined"): "e0e44ffe28dc9301ce3cd84aa11c8ccb08ce037b611bb51c2e6a0c2d948853b5",
    ("neurosurgeon", "sequential"): "3f739233f83134660669b0e98017e5d9891785a916feb3cc483bc2ce009f1f46",
    ("neurosurgeon", "pipelined"): "711145e46419c03c97c67a269acea448c9a48a3aa3ad0a4843bc998c6d446268",
}


@pytest.mark.parametrize(("policy", "objective"), RECORDED)
def test_what_is_decided_has_not_changed(policy: str, objective: str) -> None:
    digest = sha256()
    for seed in range(SEEDS):
        for traffic in TRAFFIC:
            core = PlannerCore(0, policy, Objective(objective))
            world = RandomRegion(core, seed, traffic, validate=False).run()
            for decision in world.log:
                digest.update(messages.encode(decision))
    assert digest.hexdigest() == RECORDED[policy, objective]


@pytest.mark.parametrize("objective", list(Objective))
def test_what_the_core_builds_unchecked_is_what_validation_would_build(objective: Objective) -> None:
    kinds: set[type[Change]] = set()
    for policy in ("deepar", "cloud-only"):
        for decision in RandomRegion(PlannerCore(0, policy, objective), 3, Traffic(rate=4.0), validate=False).run().log:
            for change in decision.changes:
                checked = type(change).model_validate_json(change.model_dump_json())
                assert checked == change
                assert checked.model_dump_json() == change.model_dump_json()
                kinds.add(type(change))
    assert len(kinds) == 11  # every kind of change there is
