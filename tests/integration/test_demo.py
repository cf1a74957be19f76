"""The demonstration: real inference, spread over three tiers, equal to the uncut models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bus.messages import TaskState
from bus.values import Kind
from deploy.commands.demo import _Played, _report
from deploy.demo.demo import PICTURES_A_TASK, Demo, Run, digits_right
from deploy.demo.picture import draw_run
from deploy.services.process import run_on_uvloop


@pytest.fixture(scope="module")
def played() -> tuple[Run, tuple[int, int]]:
    """The dozen tasks under DeePar."""
    demo = Demo(1, lambda line: None, None)
    try:
        run = run_on_uvloop(demo.run("deepar", lambda recorder: None))
        return run, digits_right(demo.schedule, run)
    finally:
        demo.close()


def test_every_task_completes_and_alexnet_is_spread_over_three_tiers(played: tuple[Run, tuple[int, int]]) -> None:
    run, _ = played
    assert [outcome.state for outcome in run.outcomes] == [TaskState.COMPLETED] * 12
    kinds = {outcome.placement.kind for outcome in run.outcomes if outcome.placement and outcome.model == "alexnet"}
    assert Kind.DEVICE_EDGE_CLOUD in kinds


def test_digits_are_recognised_as_the_uncut_model_does(played: tuple[Run, tuple[int, int]]) -> None:
    run, (correct, total) = played
    assert run.equal
    assert total == 160
    assert correct > 0.95 * total


def test_the_json_is_the_interfaces_and_the_picture_is_there(
    played: tuple[Run, tuple[int, int]], tmp_path: Path
) -> None:
    run, right = played
    draw_run(run, tmp_path / "run.png")
    draw_run(run, tmp_path / "run.svg")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(json.dumps(_report([_Played(run, right)], tmp_path / "run.png")))
    assert report.keys() >= {"tasks", "policies", "digits", "picture"}
    assert report["policies"]["deepar"].keys() == {"mean_delay_s", "tasks"}
    task = next(entry for entry in report["tasks"] if entry["model"] == "alexnet")
    assert task["samples"] == PICTURES_A_TASK
    assert task["predicted"].keys() == task["measured"].keys()
    assert task["placement"].keys() >= {
        "kind", "edge", "cut1", "cut2", "cut1_name", "cut2_name", "link1_bps", "link2_bps",
    }  # fmt: skip
