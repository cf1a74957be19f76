"""Each result stands in the file once, whatever became of the process that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bus.messages import SeedInput, TaskSubmitted
from deploy.services.result_file import ResultFile

TASK = TaskSubmitted(task_id="t", device="d", model="m", samples=3, input=SeedInput(seed=1))


def test_what_a_killed_device_had_written_is_kept_and_a_line_cut_short_is_not(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = ResultFile(path)
    first(TASK, 0, [np.array([0.1, 0.9])])
    first(TASK, 2, [])
    first.close()
    with path.open("a") as handle:
        handle.write('{"task_id": "t", "sam')
    again = ResultFile(path)
    assert again.kept("t") == {0, 2}
    assert again.kept("other") == set()
    again(TASK, 1, [])
    again.close()
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"task_id": "t", "model": "m", "sample": 0, "top": 1}
    assert json.loads(lines[-1])["sample"] == 1
    last = ResultFile(path)
    assert last.kept("t") == {0, 1, 2}
    last.close()
