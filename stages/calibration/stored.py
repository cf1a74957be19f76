"""Measured codecs in the user's cache: `deepar profile --codecs` stores them, stages announce them with their profiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from bus.errors import ConfigError, ModelError
from bus.values import ModelProfile
from stages.calibration.measurement import MeasuredCodecs, Step, measure_codecs
from stages.calibration.samples import Calibration, calibration_of
from stages.models.files.cache import measured_path, write_whole
from stages.models.model import Model
from stages.models.profiler import Say, measuring_alone, processor_name

METHOD = 1
"""Version of the method. Increase it when measuring or the codecs change: measurements of other versions are ignored."""


@dataclass(frozen=True, slots=True)
class CodecCache:
    """The stored measurements: for each processor, model, and version of the runtime, of Zstandard and of the method."""

    processor: str = field(default_factory=processor_name)
    method: int = METHOD

    def store(self, model: Model, found: MeasuredCodecs, say: Say | None = None) -> None:
        """Store a measurement; `say` receives a warning if the cache cannot be written."""
        try:
            write_whole(self._path(model), [found.model_dump_json(indent=2).encode()], durable=False)
        except ModelError as error:
            if say is not None:
                say(f"the codecs were not stored: {error}")

    def find(self, model: Model) -> MeasuredCodecs | None:
        """The stored measurement of a model; None if there is none."""
        with contextlib.suppress(OSError, ValueError):
            found = MeasuredCodecs.model_validate_json(self._path(model).read_bytes())
            if found.sha256 == model.sha256:
                return found
        return None

    def _path(self, model: Model) -> Path:
        versions = [metadata.version(package) for package in ("ai-edge-litert", "zstandard", "numpy")]
        known_by = [str(self.method), self.processor, model.sha256, *versions]
        return measured_path(model.name, known_by, ".codecs.json")


def measure_and_store(
    model: Model, calibration: Calibration, *, step: Step | None = None, say: Say | None = None
) -> MeasuredCodecs:
    """Measure a model's codecs on this machine, and store what was found."""
    found = measure_codecs(model, calibration, step)
    CodecCache().store(model, found, say)
    return found


def with_codecs(
    profile: ModelProfile,
    model: Model,
    *,
    remeasure: bool = False,
    say: Say | None = None,
    measure: Callable[..., MeasuredCodecs] = measure_codecs,
) -> ModelProfile:
    """The profile with the codecs that were measured on this machine, unchanged if none were.

    `remeasure` measures them again, on the samples of the last time. If these are gone, `say` receives a warning.
    """
    cache = CodecCache()
    found = cache.find(model)
    if found is None:
        return profile
    if remeasure:
        file = None if found.calibration_file is None else Path(found.calibration_file)
        try:
            calibration = calibration_of(model, file)
            if say is not None:
                say(f"measuring the codecs of {model.name} on this machine")
            with measuring_alone(say):
                found = measure(model, calibration)
            cache.store(model, found, say)
        except ConfigError as error:
            if say is not None:
                say(f"the codecs of {model.name} were not measured again: {error}")
    return found.added_to(profile)
