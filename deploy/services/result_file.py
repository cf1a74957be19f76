"""The file to which a device appends its results."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np

from bus.messages import TaskSubmitted
from bus.tensors import Array
from bus.text.json_text import json_text


class ResultFile:
    """One JSON line per result: task, sample, and the index of the largest output.

    Each (task, sample) is written once, even if the device is killed and restarted: samples in the file are not recomputed.
    """

    def __init__(self, path: Path) -> None:
        self._kept: dict[str, set[int]] = {}
        before = path.read_bytes() if path.exists() else b""
        for line in before.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line truncated by a kill
                known = json.loads(line)
                self._kept.setdefault(str(known["task_id"]), set()).add(int(known["sample"]))
        self._handle = path.open("a", encoding="utf-8")
        if before and not before.endswith(b"\n"):
            self._handle.write("\n")

    def kept(self, task_id: str) -> set[int]:
        """The samples of a task that are in the file."""
        return self._kept.get(task_id, set())

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    def __call__(self, task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
        line: dict[str, object] = {"task_id": task.task_id, "model": task.model, "sample": sample}
        if outputs and outputs[0].size:
            line["top"] = int(np.argmax(outputs[0]))
        self._handle.write(json_text(line) + "\n")
        self._handle.flush()
        self._kept.setdefault(task.task_id, set()).add(sample)
