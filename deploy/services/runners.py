"""The runner of a stage: computing on this machine, slowed down or paced by a profile, or waiting for a profile's times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from bus.errors import ConfigError
from bus.values import ModelProfile, Role
from deploy.services.settings import NodeOptions, Served, ServedModel, ServerOptions
from planner.search.profiles import load_profile
from stages.litert_runner import LitertRunner, Prepared, RunnerOptions
from stages.models.gpu.accelerator import AcceleratorOptions
from stages.runner import ModelledRunner, Runner
from stages.zoo.registry import load_model


def make_runner(
    role: Role, options: NodeOptions, models: Sequence[Served], say: Callable[[str], None] | None = None
) -> Runner:
    """A runner that computes the models (`litert`) or only waits for their times (`modelled`).

    Times come from the profile in the options; without one this machine is measured and the result is stored.
    Raises `UnknownNameError`, `ModelError`, `ConfigError`.
    """
    profile, slowdown, platform = options.profile, options.slowdown, f"{role.value} {options.name}"
    wanted = [ServedModel(model=entry) if isinstance(entry, str) else entry for entry in models]
    known: dict[str, ModelProfile] = {}
    if profile is not None:
        known = {played.model: played for played in getattr(load_profile(profile), role.value).values()}
        missing = [entry.model for entry in wanted if entry.model not in known]
        if missing:
            raise ConfigError(f"profile {profile} has no {', '.join(missing)}; it has {', '.join(sorted(known))}")
        if options.runner == "modelled":
            return ModelledRunner([scaled(known[entry.model], slowdown, platform) for entry in wanted])
    loaded = [load_model(entry.model, choice=entry.choice) for entry in wanted]
    by_name = {model.name: model for model in loaded}
    for model in loaded:
        if by_name[model.name].sha256 != model.sha256:
            raise ConfigError(f"two models are named {model.name}", remedy="rename one of the files")
    for model in loaded:
        if model.name in known and known[model.name].sha256 != model.sha256:
            raise ConfigError(
                f"profile {profile} was measured on a different {model.name}: its SHA-256 is {known[model.name].sha256}, "
                f"the model has {model.sha256}",
                remedy="use the profile without computing: --runner modelled",
            )
    measured = LitertRunner(
        loaded,
        RunnerOptions(
            slowdown=slowdown,
            num_threads=options.threads,
            platform=platform,
            paced=bool(known),
            remeasure=options.remeasure,
            gpu=gpu_options(options),
            batches=options.batches if isinstance(options, ServerOptions) else "off",
        ),
        say=say,
        prepared=Prepared(profiles=known),
    )
    if options.runner == "modelled":
        return ModelledRunner(measured.profiles())
    return measured


def gpu_options(options: NodeOptions) -> AcceleratorOptions | None:
    """When the node computes on a GPU; None: never."""
    if not isinstance(options, ServerOptions) or options.accelerator == "cpu":
        return None
    how = AcceleratorOptions(tolerance=options.gpu_tolerance, only_if_faster=options.accelerator == "auto")
    return replace(how, batches=()) if options.batches == "off" else how


def scaled(profile: ModelProfile, slowdown: float, platform: str) -> ModelProfile:
    """The profile of a machine that is `slowdown` times slower."""
    return profile.slowed(slowdown).model_copy(update={"platform": platform})
