"""The child process of `stages.models.runtime.trial_run` and `stages.models.sandbox`, where an untrusted model may crash.

It prints one JSON object per line. `main` runs a model and prints its findings in the last line; `slices` runs the slices
named on standard input. A line with `doing` names the current step, which the parent reports if the child dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from typing import Any

MEMORY_FLOOR_BYTES = 3 << 30
MEMORY_FACTOR = 8


def main() -> None:
    """Examines the file named on the command line."""
    path = _bounded()
    from stages.models.runtime.litert import examine

    with contextlib.suppress(BrokenPipeError):
        _say(doing="loading it")
        report = examine(path, lambda doing: _say(doing=doing))
        if report["missing_kernels"]:
            # the runtime names only the first; the others are tested with a model of one operator each
            report["missing_kernels"] = sorted({*report["missing_kernels"], *_missing_custom(path)})
        _say(**report)


def slices() -> None:
    """Runs the slices named on standard input, one JSON object per line; the command line names the whole model."""
    path = _bounded()
    from stages.models.runtime.litert import SliceTrial

    with contextlib.suppress(BrokenPipeError):
        _say(doing="running the whole")
        bench = SliceTrial(path)
        for line in sys.stdin:
            order = json.loads(line)
            _say(doing="running it")
            bench.run(order["path"], order["reads"], delegate=order["delegate"], batch=order["batch"])
            _say(done=True)


def _bounded() -> str:
    """Returns the file named on the command line and limits this process's memory in proportion to its size."""
    path = sys.argv[1]
    limit = MEMORY_FLOOR_BYTES + MEMORY_FACTOR * os.path.getsize(path)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return path


def _say(**words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def _missing_custom(path: str) -> list[str]:
    from ai_edge_litert import schema_py_generated as schema

    from stages.models.files.graph_builder import GraphBuilder
    from stages.models.files.operators import kind_of
    from stages.models.runtime.litert import missing_kernel

    with open(path, "rb") as file:
        model = schema.ModelT.InitFromPackedBuf(file.read(), 0)
    missing = []
    for kind in {kind_of(code) for code in model.operatorCodes}:
        if kind.startswith("CUSTOM:"):
            graph = GraphBuilder("one operator")
            ends = [graph.input("input", (1,)), graph.tensor("output", (1,))]
            graph.operator("CUSTOM", ends[:1], ends[1:], custom_code=kind.removeprefix("CUSTOM:"))
            graph.output(ends[1])
            found = missing_kernel(graph.to_bytes())
            if found:
                missing.append(found)
    return missing


if __name__ == "__main__":
    main()
