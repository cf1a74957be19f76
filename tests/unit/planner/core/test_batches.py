"""Predictions for edges and clouds that compute in batches: the tasks under way count, and what is measured corrects them."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from bus.messages import Decision, Learned, NodeAnnounced, Placed, Rerouted, TaskCompleted
from bus.values import BatchLoad, BatchSpeed, ModelProfile, Objective, Parts
from planner.core.core import Event, PlannerCore
from planner.core.options import CoreOptions
from planner.explain import explain
from planner.search.cost import PlatformRow
from tests.unit.planner.scenes import (
    MBPS,
    RandomRegion,
    Traffic,
    cloud,
    completed,
    decision_of,
    device,
    edge,
    only,
    profile,
    task,
)

FAST_LINK = 10**12
GRANT = FAST_LINK // 50
LAYER_S = 0.010
SAMPLES = 100


def batching(executors: int | None = None) -> ModelProfile:
    """Three layers of 10 ms, 4 of which a batch needs only once."""
    batch = tuple(BatchSpeed(batch=size, factors=(0.6 + 0.4 / size,) * 3) for size in (2, 4, 8, 16, 32))
    return profile(layer_s=(LAYER_S,) * 3).model_copy(update={"batch": batch, "executors": executors})


def share_s(batch: float) -> float:
    """A sample's share of a batch of all layers."""
    return 3 * LAYER_S * (0.6 + 0.4 / batch)


def devices(count: int) -> list[NodeAnnounced]:
    slow = profile(layer_s=(1.0, 1.0, 1.0))
    return [device(f"d{i}", models=(slow,)) for i in range(count)]


def core_with(*nodes: Event, objective: Objective = Objective.PIPELINED, policy: str = "cloud-only") -> PlannerCore:
    core = PlannerCore(0, policy, objective, options=CoreOptions(learning=True))
    for node in nodes:
        core.handle(node, 0.0)
    return core


def wide_edge(**values: Any) -> NodeAnnounced:
    return edge(slots=40, link1_capacity_bps=FAST_LINK, link2_capacity_bps=FAST_LINK, **values)


def placed(core: PlannerCore, number: int, now: float = 1.0, samples: int = SAMPLES) -> Placed:
    submitted = task(f"t{number}", f"d{number}", samples=samples, max_link1_bps=GRANT, max_link2_bps=GRANT)
    found: Placed = only(core.handle(submitted, now), Placed)
    return found


def clouded() -> PlannerCore:
    return core_with(wide_edge(), cloud(models=(batching(),)), *devices(9))


def test_the_cloud_is_predicted_with_the_batch_of_the_tasks_under_way() -> None:
    core = clouded()
    found = [placed(core, number) for number in range(8)]
    loads = [one.placement.cloud_batch for one in found]
    assert loads == [BatchLoad(tasks=k, batch=min(32, 8 * k), apart=k) for k in range(1, 9)]
    for k, one in enumerate(found, start=1):
        assert one.parts.cloud_s == pytest.approx(SAMPLES * share_s(min(32, 8 * k)))
        assert one.delay_s == pytest.approx(SAMPLES * k * share_s(min(32, 8 * k)), rel=0.01)
        assert one.placement.edge_batch is None


def test_short_tasks_share_batches_only_with_other_tasks() -> None:
    core = clouded()
    assert placed(core, 0, samples=3).parts.cloud_s == pytest.approx(3 * share_s(1))
    assert placed(core, 1, samples=3).parts.cloud_s == pytest.approx(3 * share_s(2))
    assert placed(core, 2).placement.cloud_batch == BatchLoad(tasks=3, batch=24, apart=3)


def test_a_task_that_has_ended_does_not_count() -> None:
    core = clouded()
    for number in range(3):
        placed(core, number)
    core.handle(completed("t1", "d1"), 2.0)
    assert placed(core, 3, 2.0).placement.cloud_batch == BatchLoad(tasks=3, batch=24, apart=3)


def test_another_model_and_the_edges_tasks_do_not_count() -> None:
    other = batching().model_copy(update={"model": "other", "sha256": "1" * 64})
    slow = [one.model_copy(update={"layer_s": (1.0,) * 3}) for one in (batching().without_batches(), other)]
    both = [device(f"d{i}", models=tuple(slow)) for i in range(3)]
    core = core_with(wide_edge(), cloud(models=(batching(), other)), *both)
    placed(core, 0)
    core.handle(task("other", "d1", model="other", samples=SAMPLES, max_link1_bps=GRANT, max_link2_bps=GRANT), 1.0)
    assert placed(core, 2).placement.cloud_batch == BatchLoad(tasks=2, batch=16, apart=2)


def test_an_edge_counts_its_own_tasks_and_executors() -> None:
    two = [wide_edge(node=name, models=(batching(2),)) for name in ("e1", "e2")]
    reach = [
        one.model_copy(update={"reachable_edges": ("e1" if at < 5 else "e2",)}) for at, one in enumerate(devices(8))
    ]
    core = core_with(*two, *reach, policy="edge-only")
    found = [placed(core, number).placement for number in range(8)]
    assert [(one.edge, one.edge_batch.tasks) for one in found if one.edge_batch is not None] == [
        *(("e1", k) for k in range(1, 6)),
        *(("e2", k) for k in range(1, 4)),
    ]
    assert found[4].edge_batch == BatchLoad(tasks=5, batch=20, apart=2.5)
    assert all(one.cloud_batch is None for one in found)


def test_an_edge_never_computes_for_more_tasks_than_it_has_slots() -> None:
    """So a task that waits for a slot does not count beside the one that it waits for."""
    core = core_with(wide_edge(models=(batching(),)).model_copy(update={"slots": 2}), *devices(4), policy="edge-only")
    found = [placed(core, number) for number in range(4)]
    assert [one.placement.edge_batch.tasks for one in found if one.placement.edge_batch is not None] == [1, 2, 2, 2]
    assert [one.wait_s > 0 for one in found] == [False, False, True, True]


def test_sequential_tasks_are_predicted_one_by_one() -> None:
    core = core_with(wide_edge(), cloud(models=(batching(),)), *devices(2), objective=Objective.SEQUENTIAL)
    for number in range(2):
        one = placed(core, number)
        assert one.parts.cloud_s == pytest.approx(SAMPLES * share_s(1))
        assert one.placement.cloud_batch is None


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("batch", [1.0, 4.0, 20.0])
def test_what_was_measured_is_compared_with_the_batches_that_there_were(factor: float, batch: float) -> None:
    """Not with the predicted ones: how fast the cloud is does not depend on how many tasks it had."""
    core = clouded()
    measured = Parts(cloud_s=factor * SAMPLES * share_s(batch))
    for number in range(4):
        one = placed(core, number, 2.0 * number + 1.0)
        done = TaskCompleted(
            task_id=f"t{number}", attempt=1, node=f"d{number}", measured=measured, delay_s=one.delay_s, cloud="c1",
            cloud_batches=SAMPLES / batch,
        )  # fmt: skip
        learned = only(core.handle(done, 2.0 * number + 2.0), Learned).nodes[0]
    assert learned.factor == pytest.approx(factor, rel=0.1)
    later = placed(core, 8, 20.0)
    assert later.parts.cloud_s == pytest.approx(factor * SAMPLES * share_s(8), rel=0.1)
    assert later.placement.cloud_batch == BatchLoad(tasks=1, batch=8, apart=1)


def test_a_node_that_announces_its_batches_is_as_fast_as_it_says() -> None:
    """What was learned of its batches without knowing them must not count on top of them."""
    plain = batching().without_batches()
    core = core_with(wide_edge(), cloud(models=(plain,)), *devices(9))
    for number in range(4):
        one = placed(core, number)
        done = TaskCompleted(
            task_id=f"t{number}", attempt=1, node=f"d{number}", measured=Parts(cloud_s=SAMPLES * share_s(20)),
            delay_s=one.delay_s, cloud="c1", cloud_batches=SAMPLES / 20,
        )  # fmt: skip
        core.handle(done, 2.0)
    assert placed(core, 4, 3.0).parts.cloud_s == pytest.approx(SAMPLES * share_s(20), rel=0.1)
    core.handle(cloud(models=(batching(),)), 4.0)
    assert placed(core, 5, 5.0).parts.cloud_s == pytest.approx(SAMPLES * share_s(16), rel=0.01)


@pytest.mark.parametrize("batches", [1e-320, 1e-9, 1e12])
def test_impossible_batches_in_a_report_count_as_the_nearest_possible_ones(batches: float) -> None:
    core = clouded()
    one = placed(core, 0)
    done = TaskCompleted(
        task_id="t0", attempt=1, node="d0", measured=one.parts, delay_s=one.delay_s, cloud="c1", cloud_batches=batches
    )
    nearest = min(32.0, max(1.0, SAMPLES / max(batches, 1e-9)))
    learned = only(core.handle(done, 2.0), Learned).nodes[0]
    assert learned.profile_s == pytest.approx(SAMPLES * share_s(nearest))


def test_rows_of_measured_batches_are_not_kept() -> None:
    """Each task has another mean batch."""
    tasks = 20
    core = core_with(wide_edge(), cloud(models=(batching(),)), *devices(tasks))
    found = [placed(core, number) for number in range(tasks)]

    def rows() -> set[int]:
        gc.collect()
        return {id(one) for one in gc.get_objects() if isinstance(one, PlatformRow)}

    before = rows()
    for number, one in enumerate(found):
        done = TaskCompleted(
            task_id=f"t{number}", attempt=1, node=f"d{number}", measured=one.parts, delay_s=one.delay_s, cloud="c1",
            cloud_batches=SAMPLES / (2.0 + 0.1 * number),
        )  # fmt: skip
        only(core.handle(done, 2.0), Learned)
    assert len(rows() - before) < tasks


def test_delays_that_came_true_leave_no_overhead() -> None:
    """The measured shares of batches explain the delay, with the times between samples."""
    core = clouded()
    found = [placed(core, number) for number in range(8)]
    for number, one in reversed(list(enumerate(found))):  # so that each has as many tasks beside it as at its placement
        done = TaskCompleted(
            task_id=f"t{number}", attempt=1, node=f"d{number}", measured=one.parts, delay_s=one.delay_s, cloud="c1",
            cloud_batches=SAMPLES / min(32, 8 * number + 8),
        )  # fmt: skip
        learned = only(core.handle(done, 100.0), Learned)
        assert learned.paths[0].gap_s == pytest.approx(0.0, abs=1e-4 * one.delay_s)
        assert learned.nodes[0].profile_s == pytest.approx(one.parts.cloud_s, rel=1e-4)


def test_a_delay_is_explained_by_the_tasks_at_the_placement_and_at_the_end() -> None:
    """A task that others joined later waits for them: that is no overhead of its path."""
    core = clouded()
    first = placed(core, 0)
    for number in range(1, 3):
        placed(core, number)
    share = SAMPLES * share_s(24)
    done = TaskCompleted(
        task_id="t0", attempt=1, node="d0", measured=first.parts.model_copy(update={"cloud_s": share}),
        delay_s=2 * share, cloud="c1", cloud_batches=SAMPLES / 24,
    )  # fmt: skip
    gap_s = only(core.handle(done, 5.0), Learned).paths[0].gap_s
    assert gap_s == pytest.approx(0.0, abs=0.001)  # two samples of the cloud's for each of this task: 1 to 3 tasks


def test_a_rerouted_task_does_not_count_beside_itself() -> None:
    """It gets the bandwidth of the task that has ended."""
    quick = batching().model_copy(update={"layer_s": (0.001,) * 3})
    core = PlannerCore(0, "elastic", Objective.PIPELINED)
    for node in (edge(models=(quick,), slots=2, link1_capacity_bps=100 * MBPS), *devices(3)):
        core.handle(node, 0.0)
    for number in range(2):
        core.handle(task(f"t{number}", f"d{number}", samples=SAMPLES, max_link1_bps=70 * MBPS), 1.0)
    placements = [one.placed.placement for one in core.tasks.values() if one.placed is not None]
    assert [one.edge_batch.tasks for one in placements if one.edge_batch is not None] == [1, 2]
    changed = only(core.handle(completed("t0", "d0"), 1.2), Rerouted)
    assert (changed.task_id, changed.placement.link1_bps) == ("t1", 70 * MBPS)
    assert changed.placement.edge_batch == BatchLoad(tasks=1, batch=8, apart=1)
    rerouted = core.tasks["t1"].placed
    assert rerouted is not None
    assert rerouted.placement == changed.placement
    core.handle(completed("t1", "d1"), 5.0)
    assert placed(core, 2, 6.0).placement.edge_batch == BatchLoad(tasks=1, batch=8, apart=1)


def test_the_explanation_knows_the_batches() -> None:
    core, log = PlannerCore(0, "deepar", Objective.PIPELINED), list[Decision]()
    grants = {"max_link1_bps": GRANT, "max_link2_bps": GRANT}
    tasks = [task(f"t{number}", f"d{number}", samples=SAMPLES, **grants) for number in range(6)]
    events: list[Event] = [wide_edge(models=(batching(),)), cloud(models=(batching(2),)), *devices(6), *tasks]
    for at, event in enumerate(events):
        changes = core.handle(event, at / 100)
        log.append(decision_of(changes, at + 1, at / 100, core))
    for number in range(6):
        found = explain(log, f"t{number}")
        assert found.candidates[0].chosen
        assert found.decided is not None
        assert found.candidates[0].delay_s == pytest.approx(found.decided.delay_s)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", ["deepar", "routes", "elastic"])
def test_where_tasks_run_one_sample_at_a_time_batches_change_no_decision(seed: int, policy: str) -> None:
    """And where they are pipelined they do."""
    objective = Objective.SEQUENTIAL if policy == "deepar" else Objective.PIPELINED

    def decided(*, batches: bool) -> list[Placed]:
        world = RandomRegion(PlannerCore(0, policy, objective), seed, Traffic(rate=6.0, batches=batches)).run()
        return list(world.placed.values())

    assert (decided(batches=True) == decided(batches=False)) == (objective is Objective.SEQUENTIAL)
