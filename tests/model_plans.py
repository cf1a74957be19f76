"""Profiles and plans for tests of runners that compute real models."""

from __future__ import annotations

from bus.frames import AttemptPlan
from bus.values import Execution, Kind, ModelProfile, Placement
from stages.models.model import Model


def profile_of(model: Model, layer_s: float = 0.001) -> ModelProfile:
    """A profile in which each layer takes `layer_s`; the default is too long for the event loop."""
    cuts = model.manifest.cuts
    return ModelProfile(
        model=model.name, sha256=model.sha256, platform="p", layer_names=tuple(cut.name for cut in cuts[1:]),
        layer_s=(layer_s,) * model.manifest.layers, cut_bytes=tuple(cut.cut_bytes for cut in cuts),
    )  # fmt: skip


def plan_of(model: Model, task_id: str = "t") -> AttemptPlan:
    """A task of one sample, all seven layers on the device."""
    return AttemptPlan(
        task_id=task_id, attempt=1, region=0, device="d", model=model.name, sha256=model.sha256, samples=1, todo=1,
        execution=Execution.STREAMING,
        placement=Placement(kind=Kind.DEVICE, cut1=7, cut2=7, cut1_name="", cut2_name=""),
    )  # fmt: skip
