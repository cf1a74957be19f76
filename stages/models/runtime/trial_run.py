"""A trial run of an untrusted model in a child process.

A well-formed file can still crash the runtime: a stride of zero, an index out of bounds, an endless loop, a tensor of a
terabyte. So a child with limited memory and time loads and runs the model first; if the child dies, the model is rejected.
The child also reports which shapes are fixed and which operators have no kernel. The findings are cached by the model's hash.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from bus.errors import ModelError
from stages.models.files.cache import cache_dir, write_whole
from stages.models.runtime.facts import RuntimeFacts

LONGEST_S = 30.0
"""Time limit of a trial run; VGG-16 takes one second."""

TRIAL_VERSION = 3
"""Version of the child's report. Increase it when the report changes, so that cached findings are replaced."""


FINDINGS = frozenset({"shapes", "late", "missing_kernels"})
"""What the child reports of a model that passes."""

LEFTOVER_S = 86_400.0
"""A temporary file of this age belongs to a process that was killed."""


@dataclass(frozen=True, slots=True)
class ChildProgram:
    """The Python code that a child process runs, and its time limit."""

    code: str
    longest_s: float = LONGEST_S  # from the start of a run to its answer


WHOLE_MODEL = ChildProgram("from stages.models.runtime.trial_child import main; main()")
"""Runs the whole model."""


def trial(source: Path | bytes, sha256: str, shown: str, child: ChildProgram = WHOLE_MODEL) -> RuntimeFacts:
    """The findings of a trial run, from the cache if possible. Raises `ModelError` if the run fails."""
    path = findings_file(sha256, "json")
    found = _stored(path)
    if found is None:
        found = _run(source, child)
        if not found.get("passing"):
            write_whole(path, [json.dumps(found).encode()], durable=False)
    if found.get("fault"):
        raise ModelError(shown, found["fault"])
    return RuntimeFacts(
        shapes={int(tensor): tuple(shape) for tensor, shape in found["shapes"].items()},
        late={int(tensor): None if shape is None else tuple(shape) for tensor, shape in found["late"].items()},
        missing_kernels=frozenset(found["missing_kernels"]),
    )


def _stored(path: Path) -> dict[str, Any] | None:
    """The stored findings; None if there are none, or the file is damaged."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and ("fault" in found or found.keys() >= FINDINGS):
            return found
    return None


def _run(source: Path | bytes, child: ChildProgram) -> dict[str, Any]:
    """Runs the child and returns its report."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes):
            file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".tflite", dir=trial_folder()))
            file.write(source)
            file.flush()
            source = Path(file.name)
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", child.code, str(source)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=child.longest_s,
                check=False,
                env=child_environment(os.environ),
            )
        except subprocess.TimeoutExpired:
            return {"fault": f"a trial run did not end within {child.longest_s:.0f} s", "passing": True}
    report: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            report = json.loads(line)
    if done.returncode == 0 and report:
        return report
    stage = report.get("doing", "starting")
    if done.returncode < 0:
        cause = f"died of {signal.Signals(-done.returncode).name}"
    else:
        cause = f"ended with {done.returncode}: {last_words(done.stderr)}"
    return {"fault": f"a trial run {cause} while {stage}", "passing": stage == "starting"}


def trial_folder() -> Path:
    """The folder of findings, and of temporary files that a child runs."""
    folder = cache_dir("trials")
    _tidy(folder)
    return folder


@lru_cache(maxsize=1)
def _tidy(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; once for each process."""
    with contextlib.suppress(OSError):
        for file in folder.glob("tmp*.tflite"):
            if time.time() - file.stat().st_mtime > LEFTOVER_S:
                file.unlink(missing_ok=True)


def findings_file(sha256: str, kind: str) -> Path:
    """The path of one kind of findings about a model; each version of the runtime has its own."""
    return trial_folder() / f"{sha256}-{metadata.version('ai-edge-litert')}-{TRIAL_VERSION}.{kind}"


def last_words(stderr: bytes) -> str:
    """The last line that a child wrote to standard error."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def child_environment(own: Mapping[str, str], threads: int = 1) -> dict[str, str]:
    """The environment `own` with DeePar's packages importable and numeric libraries limited to `threads` threads."""
    root = str(Path(__file__).resolve().parents[3])
    known = own.get("PYTHONPATH")
    return {
        **own,
        "PYTHONPATH": root if not known else f"{root}{os.pathsep}{known}",
        "OPENBLAS_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONFAULTHANDLER": "",
    }
