"""The GPU process: loads and runs files on the GPU as the node orders on standard input, one order at a time.

The driver may crash it. The runtime logs a lot to both standard streams: what it logs while it loads a file gives the reason
of a failure, the rest is dropped.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol, TypeAlias

from bus.tensors import Array
from stages.models.gpu.messages import receive, send
from stages.models.gpu.shared_area import SharedArea

ABSENT = ("No adapters found", "Failed to initialize WebGPU environment", "Failed to register GPU accelerator")
"""Log lines of the runtime that mean that no GPU can be used at all."""


class Loaded(Protocol):
    """A file on the GPU."""

    def run(self, inputs: Array, outputs: Array) -> None:
        """Compute the values of the outputs. Raises `RuntimeError`, `ValueError`."""


Shapes: TypeAlias = list[list[int]]

Load: TypeAlias = Callable[[str, Shapes, Shapes], Loaded]
"""path, shapes of the inputs and of the outputs"""


def on_gpu(path: str, inputs: Shapes, outputs: Shapes) -> Loaded:
    """The file, loaded by LiteRT. Raises `RuntimeError` where the driver refuses it."""
    from stages.models.runtime.gpu import GpuModel

    return GpuModel(path, inputs, outputs)


def main(load: Load = on_gpu) -> None:
    """Answers orders until standard input ends."""
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    models: dict[int, Loaded] = {}
    area = SharedArea(int(sys.argv[1]))
    with contextlib.suppress(BrokenPipeError):
        while (words := receive(sys.stdin.buffer)) is not None:
            send(answers, _answer(load, models, area, words))


def _answer(load: Load, models: dict[int, Loaded], area: SharedArea, words: dict[str, Any]) -> dict[str, Any]:
    match words["do"]:
        case "load":
            return _load(load, models, words)
        case "unload":
            models.pop(words["key"], None)
            return {}
        case _:
            try:
                area.grow(words["inputs"], words["outputs"])
                models[words["key"]].run(*area.halves(words["inputs"], words["outputs"]))
            except (RuntimeError, ValueError, OSError) as error:
                return {"fault": f"the GPU failed: {_reason(str(error))}"}
            return {}


def _load(load: Load, models: dict[int, Loaded], words: dict[str, Any]) -> dict[str, Any]:
    with _captured() as log:
        try:
            models[words["key"]] = load(words["path"], words["inputs"], words["outputs"])
        except (ImportError, RuntimeError, ValueError) as error:
            log.seek(0)
            said = log.read().decode(errors="replace")
            absent = isinstance(error, ImportError) or any(line in said for line in ABSENT)
            if absent:
                return {"fault": "no usable GPU: LiteRT finds no Vulkan loader or no driver", "absent": True}
            return {"fault": f"the GPU refuses it: {_reason(str(error))}"}
    return {}


@contextlib.contextmanager
def _captured() -> Iterator[BinaryIO]:
    """Both standard streams of the runtime go to the returned file until the block ends."""
    with tempfile.TemporaryFile() as log:
        kept = [os.dup(1), os.dup(2)]
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            yield log
        finally:
            for stream, old in zip((1, 2), kept, strict=True):
                os.dup2(old, stream)
                os.close(old)


def _reason(error: str) -> str:
    lines = [line.strip(" └") for line in error.splitlines() if line.strip()]
    return lines[-1].partition(". ")[0] if lines else "no reason given"  # what follows is advice to programmers
