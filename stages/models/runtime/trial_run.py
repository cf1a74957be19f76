"""A trial run of a foreign model in a process of its own.

A file may be well-formed and still bring the runtime down: a stride of zero, an index out of bounds, a loop without end, a
tensor of a terabyte. So a model that is not ours is first loaded and run once by a child with bounded memory and time; if
the child dies, the model is refused and nothing else happened. The child also reports what only the runtime knows: which
shapes are fixed, which operators have no kernel. Its findings are kept in the cache under the model's hash.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bus.errors import ModelError
from stages.models.files.cache import cache_dir, write_whole
from stages.models.runtime.facts import RuntimeFacts

LONGEST_S = 30.0
"""How long a trial may take; a whole VGG-16 takes one second."""

TRIAL_VERSION = 3
"""Raised when the child reports something else than before, so that kept findings are made anew."""

CHILD = "from stages.models.runtime.trial_child import main; main()"


def trial(source: Path | bytes, sha256: str, shown: str) -> RuntimeFacts:
    """What a trial run of the model shows. Raises `ModelError` where it ends badly."""
    path = findings_file(sha256, "json")
    found: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
    if found is None:
        found = _run(source, shown)
        if not found.get("passing"):
            write_whole(path, [json.dumps(found).encode()], durable=False)
    if found.get("fault"):
        raise ModelError(shown, found["fault"])
    return RuntimeFacts(
        shapes={int(tensor): tuple(shape) for tensor, shape in found["shapes"].items()},
        late={int(tensor): None if shape is None else tuple(shape) for tensor, shape in found["late"].items()},
        missing_kernels=frozenset(found["missing_kernels"]),
    )


def _run(source: Path | bytes, shown: str) -> dict[str, Any]:
    """Starts the child, waits, reads its report."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes):
            file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".tflite", dir=trial_folder()))
            file.write(source)
            file.flush()
            source = Path(file.name)
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", CHILD, str(source)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=LONGEST_S,
                check=False,
                env=child_environment(os.environ),
            )
        except subprocess.TimeoutExpired:
            return {"fault": f"a trial run did not end within {LONGEST_S:.0f} s", "passing": True}
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
    """Where findings are kept, and files that a child is to run lie meanwhile."""
    return cache_dir("trials")


def findings_file(sha256: str, kind: str) -> Path:
    """Where findings of one kind about the model of that hash are kept; another runtime makes its own."""
    return trial_folder() / f"{sha256}-{metadata.version('ai-edge-litert')}-{TRIAL_VERSION}.{kind}"


def last_words(stderr: bytes) -> str:
    """The last line that a child complained with."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def child_environment(own: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: ours, our packages importable, one thread for the libraries that start more."""
    root = str(Path(__file__).resolve().parents[3])
    known = own.get("PYTHONPATH")
    return {
        **own,
        "PYTHONPATH": root if not known else f"{root}{os.pathsep}{known}",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "",
    }
