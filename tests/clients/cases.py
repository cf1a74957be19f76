"""Inputs and expected outputs of models, shared by a test and the scripts that it starts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DATATYPES = {
    "float32": "FP32",
    "float64": "FP64",
    "int8": "INT8",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}


class Case(NamedTuple):
    """One model with a batch of samples."""

    model: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


def save(folder: Path, case: Case) -> None:
    """Write a case to a folder."""
    arrays = {f"in/{name}": array for name, array in case.inputs.items()}
    arrays |= {f"out/{name}": array for name, array in case.outputs.items()}
    np.savez(folder / f"{case.model}.npz", allow_pickle=False, **arrays)


def load(folder: Path) -> list[Case]:
    """All cases in a folder."""
    cases = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            inputs = {name[3:]: file[name] for name in file.files if name.startswith("in/")}
            outputs = {name[4:]: file[name] for name in file.files if name.startswith("out/")}
        cases.append(Case(path.stem, inputs, outputs))
    return cases


def first(case: Case) -> Case:
    """The case with its first sample only."""
    return Case(
        case.model,
        {name: array[:1] for name, array in case.inputs.items()},
        {name: array[:1] for name, array in case.outputs.items()},
    )


class Comparison:
    """Compares answers bit by bit and counts them."""

    def __init__(self) -> None:
        self.answers = 0
        self.refusals = 0

    def same(self, case: Case, output: Callable[[str], Array | None], what: str) -> None:
        """Every output of the case is there and identical."""
        for name, expected in case.outputs.items():
            got = output(name)
            assert got is not None, f"{case.model}, {what}: no output {name}"
            assert got.dtype == expected.dtype, f"{case.model}, {what}, {name}: {got.dtype}, not {expected.dtype}"
            assert got.shape == expected.shape, f"{case.model}, {what}, {name}: {got.shape}, not {expected.shape}"
            assert got.tobytes() == expected.tobytes(), f"{case.model}, {what}, {name}: {got} differs from {expected}"
        self.answers += 1

    def refused(self, error: Exception, status: str, text: str, what: str) -> None:
        """The refusal has this status and text."""
        got = str(getattr(error, "status", lambda: "")() or "")
        assert status in got, f"{what}: status {got!r}, not {status!r}: {error}"
        assert text in str(error), f"{what}: {text!r} is not in {str(error)!r}"
        self.refusals += 1


class Given(NamedTuple):
    """What a script is told."""

    cases: list[Case]
    http: str  # HOST:PORT, or nothing
    grpc: str


def given() -> Given:
    """The command line: the folder of the cases, and the addresses. Without flags, since kserve reads those as its own."""
    folder, http, grpc = sys.argv[1:4]
    return Given(load(Path(folder)), http, grpc)
