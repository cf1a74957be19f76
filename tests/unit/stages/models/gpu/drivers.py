"""GPU processes with scripted drivers: each computes on the CPU, more or less well."""

from __future__ import annotations

import os
import signal
import threading
from math import prod
from typing import Any

import numpy as np

from bus.tensors import Array
from stages.models.gpu import child
from stages.models.runtime.litert import SegmentRunner
from stages.models.runtime.trial_run import ChildProgram


def program(driver: str, **options: Any) -> ChildProgram:
    """A child process with one of the drivers below."""
    longest_s = options.pop("longest_s", 60.0)
    return ChildProgram(
        f"from tests.unit.stages.models.gpu.drivers import {driver}; {driver}(**{options!r})", longest_s=longest_s
    )


class Driver:
    """Every result is wrong by a share of itself; the process dies at one run of all, another one fails."""

    runs = 0
    dies_at: int | None = None
    fails_at: int | None = None

    def __init__(self, path: str, shapes: child.Shapes, error: float, wrong_above: float) -> None:
        self._runner, self._shapes = SegmentRunner(path), shapes
        self._factor = np.float32(1.0 + error)
        self._wrong_above = wrong_above

    def run(self, inputs: Array, outputs: Array) -> None:
        Driver.runs += 1
        if Driver.runs == self.dies_at:
            os.kill(os.getpid(), signal.SIGSEGV)
        if Driver.runs == self.fails_at:
            raise RuntimeError("device lost")
        at, tensors = 0, []
        for shape in self._shapes:
            size = prod(shape)
            tensors.append(inputs[at : at + size].reshape(shape))
            at += size
        factor = self._factor if np.max(inputs) < self._wrong_above else np.float32(1.5)
        outputs[...] = np.concatenate([(one * factor).reshape(-1) for one in self._runner.run(tensors)])


def scripted(
    error: float = 1e-6,
    batch_error: float | None = None,
    wrong_above: float = float("inf"),
    dies_at: int | None = None,
    fails_at: int | None = None,
) -> None:
    """Wrong by a share, in batches by another one if it is given, by half above a value; dies at a run, fails at a run."""
    Driver.dies_at, Driver.fails_at = dies_at, fails_at

    def load(path: str, inputs: child.Shapes, outputs: child.Shapes) -> child.Loaded:
        wrong = error if inputs[0][0] == 1 or batch_error is None else batch_error
        return Driver(path, inputs, wrong, wrong_above)

    child.main(load)


def refusing() -> None:
    """Refuses every file."""

    def load(path: str, inputs: child.Shapes, outputs: child.Shapes) -> child.Loaded:
        raise RuntimeError("ERROR: [x.h:1]\n└ ERROR: unknown operator. Set some option")

    child.main(load)


def absent() -> None:
    """No GPU is there; the runtime says so in its log only."""

    def load(path: str, inputs: child.Shapes, outputs: child.Shapes) -> child.Loaded:
        os.write(2, b"E0000 No adapters found\n")
        raise RuntimeError("ERROR: [compiled_model.cc:1036]")

    child.main(load)


def crashing() -> None:
    """Dies while it loads a file."""

    def load(path: str, inputs: child.Shapes, outputs: child.Shapes) -> child.Loaded:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError

    child.main(load)


def hanging() -> None:
    """Never answers."""

    def load(path: str, inputs: child.Shapes, outputs: child.Shapes) -> child.Loaded:
        threading.Event().wait()
        raise AssertionError

    child.main(load)
