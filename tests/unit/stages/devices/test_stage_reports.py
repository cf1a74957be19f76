"""What a device takes from the reports of other stages: no report, however absurd, keeps a finished task from ending."""

from __future__ import annotations

from bus.frames import MAX_BUSY_S, AttemptPlan, Frame
from bus.messages import TaskCompleted
from bus.values import Execution, Kind, Placement
from stages.devices.stage_reports import StageReports

SAMPLES = 20

PLAN = AttemptPlan(
    task_id="t1",
    attempt=1,
    region=0,
    device="d1",
    model="m",
    sha256="0" * 64,
    samples=SAMPLES,
    todo=SAMPLES,
    execution=Execution.STREAMING,
    placement=Placement(
        kind=Kind.DEVICE_EDGE_CLOUD, edge="e1", cut1=1, cut2=2, cut1_name="a", cut2_name="b", link1_bps=1, link2_bps=1
    ),
)


def reported(report: dict[str, float], times: int = 1) -> StageReports:
    reports = StageReports(PLAN)
    for _ in range(times):
        reports.take(Frame("report", "t1", 1, "e1", report=report))
    return reports


def test_a_sum_of_batches_is_at_most_that_of_single_samples() -> None:
    for batches, taken in ((5.0, 5.0), (MAX_BUSY_S, SAMPLES), (0.0, None), (5e-324, 5e-324)):
        assert reported({"edge_batches": batches}).batches("edge") == taken
    reports = reported({"edge_batches": MAX_BUSY_S, "cloud_batches": MAX_BUSY_S, "edge_s": MAX_BUSY_S}, times=3)
    completed = TaskCompleted(
        task_id="t1",
        attempt=1,
        node="d1",
        measured=reports.parts(),
        delay_s=1.0,
        edge_batches=reports.batches("edge"),
        cloud_batches=reports.batches("cloud"),
    )
    assert (completed.edge_batches, completed.cloud_batches) == (SAMPLES, SAMPLES)


def test_unknown_keys_of_reports_are_not_kept() -> None:
    reports = StageReports(PLAN)
    for i in range(1_000):
        reports.take(Frame("report", "t1", 1, "e1", report={f"key_{i}": 1.0, "edge_s": 0.5, "edge_predicted_s": 0.25}))
    assert reports.measured == {"edge_s": 500.0, "edge_predicted_s": 250.0}
