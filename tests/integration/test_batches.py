"""A cloud stage that really computes, in batches: every sample of every task gets the result of the model that is not cut."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from bus import messages, topics
from bus.frames import AttemptPlan, Frame, decode_frame, encode_frame
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import EpochOpened
from bus.tensors import to_pieces
from bus.topics import Partitions
from bus.values import Execution, Kind, Placement, Role
from stages.hops.hop import hop_of
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.membership.settings import NodeSettings
from stages.models.model import Model
from stages.models.segments.batch_check import BatchCheck, store_check
from stages.models.segments.store import SegmentStore
from stages.node import Node
from stages.zoo.registry import digits, load_model
from tests.model_plans import profile_of

CUT, LAYERS = 4, 7
TASKS, SAMPLES = 6, 10
BAD = "t2"  # its last sample has the right size, but another shape


def plan_of(model: Model, task_id: str) -> AttemptPlan:
    rate_bps = 1 << 36
    placement = Placement(
        kind=Kind.EDGE_CLOUD, edge="e", cut1=0, cut2=CUT, cut1_name="input", cut2_name="maxpool_2",
        link1_bps=rate_bps, link2_bps=rate_bps,
    )  # fmt: skip
    return AttemptPlan(
        task_id=task_id, attempt=1, region=0, device="d", model=model.name, sha256=model.sha256, samples=SAMPLES,
        todo=SAMPLES, execution=Execution.STREAMING, placement=placement,
    )  # fmt: skip


def test_tasks_that_are_computed_together_get_their_own_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))
    model, store = load_model("lenet"), SegmentStore(load_model("lenet"))
    passed = BatchCheck(most=32, exact=True, speedup=4.0)
    for begin in (0, CUT, 5, 6):
        store_check(passed, store, begin, LAYERS, 1)
    head, whole = store.prepare(0, CUT), store.prepare(0, LAYERS)
    images = {
        (f"t{task}", at): digits()[0][10 * task + at][np.newaxis] for task in range(TASKS) for at in range(SAMPLES)
    }

    async def run() -> dict[tuple[str, int], bytes]:
        prepared = Prepared(stores={model.name: store}, profiles={model.name: profile_of(model, layer_s=0.01)})
        runner = LitertRunner([model], RunnerOptions(batches="exact"), prepared=prepared)
        async with MemoryBus(MemoryBroker(), "test") as bus:
            await bus.create_topics(topics.specs(["e"], Partitions(cloud=1, results=1)))
            opened = EpochOpened(region=0, epoch=1, nonce="n", planner="p", lease_s=600.0)
            await bus.send(topics.DECISIONS, messages.encode(opened), key="0", partition=0)
            results = await bus.reader([(topics.RESULTS, 0)], start="start")
            for (task_id, sample), image in images.items():
                (tensor,) = head.run([image])
                if (task_id, sample) == (BAD, SAMPLES - 1):
                    tensor = tensor.reshape(tensor.shape[::-1])
                plan = plan_of(model, task_id) if sample == 0 else None
                frame = Frame("activations", task_id, 1, "d", tuple(to_pieces(sample, [tensor], 1 << 20)), plan)
                await bus.send(topics.ACTIVATIONS_CLOUD, encode_frame(frame), key=task_id)
            node = Node(bus, NodeSettings(name="c", role=Role.CLOUD), runner)
            work = asyncio.create_task(node.run(hop_of(node)))
            found: dict[tuple[str, int], bytes] = {}
            try:
                async with asyncio.timeout(60):
                    while sum(task_id != BAD for task_id, _ in found) < (TASKS - 1) * SAMPLES:
                        for record in await results.fetch(timeout_s=0.1):
                            frame = decode_frame(record.value)
                            if frame.kind == "result":
                                found |= {(frame.task_id, one.sample): bytes(one.data) for one in frame.pieces}
            finally:
                work.cancel()
                await asyncio.wait([work])
                await results.close()
                await runner.close()
        assert max(runner.batch_sizes()) > 1
        return found

    found = asyncio.run(run())
    assert (BAD, SAMPLES - 1) not in found
    for key, data in found.items():
        (right,) = whole.run([images[key]])
        assert data == right.tobytes(), key
