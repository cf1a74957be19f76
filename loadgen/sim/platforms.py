"""How fast the simulated device, edge and cloud are: three rows of profiles, and the links of the one-task
experiments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from bus.errors import unknown_name
from bus.values import ModelProfile, Role
from planner.search.profiles import parse_profile, profile_text

FIRST_VERDICT_SEED = 10
"""Seeds below are for fits and for trials; the verdicts of figures rest on those from here on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platforms:
    """Profiles by tier, and what stands around one task alone."""

    profiles: Mapping[Role, tuple[ModelProfile, ...]]  # what each tier announces
    link1_bps: int  # b1 of Figures 1(a) and 3
    link2_bps: int  # b2
    input_bytes: Mapping[str, int]  # G(0) of one sample in Figures 1(a) and 3, by model
    name: str  # what error messages call it
    origin: str  # where the numbers come from, for notes beside plots
    fitted_to: tuple[str, ...] = ()  # figures whose statements the numbers were fitted to
    fit_seeds: tuple[int, ...] = ()  # seeds that the fit used; verdicts use others

    def unused_seeds(self, count: int) -> tuple[int, ...]:
        """The first `count` seeds from `FIRST_VERDICT_SEED` on that the fit did not use."""
        numbers = (seed for seed in itertools.count(FIRST_VERDICT_SEED) if seed not in self.fit_seeds)
        return tuple(itertools.islice(numbers, count))

    def require(self, models: Iterable[str]) -> None:
        """Raises `UnknownNameError` for a model that no tier has times for: no task of it could be placed."""
        known = list(dict.fromkeys(profile.model for profiles in self.profiles.values() for profile in profiles))
        for model in models:
            if model not in known:
                raise unknown_name(f"model in {self.name} called", model, known)

    def model(self, role: Role, name: str) -> ModelProfile:
        """One model's profile on one tier. Raises `UnknownNameError`."""
        for profile in self.profiles[role]:
            if profile.model == name:
                return profile
        raise unknown_name(f"model profiled on the {role} called", name, [one.model for one in self.profiles[role]])


def platforms(name: str) -> Platforms:
    """The platforms of a profile by name (`paper`) or file, as the file is now. Raises `UnknownNameError`, `ConfigError`."""
    return _platforms(name, profile_text(name))


@lru_cache(maxsize=8)
def _platforms(name: str, text: str) -> Platforms:
    found = parse_profile(name, text)
    return Platforms(
        profiles={
            Role.DEVICE: tuple(found.device.values()),
            Role.EDGE: tuple(found.edge.values()),
            Role.CLOUD: tuple(found.cloud.values()),
        },
        link1_bps=found.link1_bps,
        link2_bps=found.link2_bps,
        input_bytes={model: found.input_bytes.get(model, found.device[model].cut_bytes[0]) for model in found.models},
        name=f"profile {found.name}",
        origin=f"profile {found.name}" + (f": {found.origin}" if found.origin else ""),
        fitted_to=found.fitted_to,
        fit_seeds=found.fit_seeds,
    )


def measured(progress: Callable[[str, int, int], None] | None = None) -> Platforms:
    """AlexNet measured layer by layer on this machine, which plays the edge.

    The device and the cloud are this machine, slower or faster by the same factors as in the `paper` profile;
    links and input are the paper's. Takes seconds, and the first time makes AlexNet's weights. Raises
    `ModelError`.
    """
    from stages.models.profiler import machine_profile
    from stages.zoo import load_model

    paper = platforms("paper")
    if progress is not None:
        progress("measuring AlexNet", 0, 1)
    here = machine_profile(load_model("alexnet"))
    if progress is not None:
        progress("measuring AlexNet", 1, 1)
    edge_s = sum(paper.model(Role.EDGE, "alexnet").layer_s)
    profiles = {}
    for role in (Role.DEVICE, Role.EDGE, Role.CLOUD):
        factor = sum(paper.model(role, "alexnet").layer_s) / edge_s
        scaled = tuple(seconds * factor for seconds in here.layer_s)
        profiles[role] = (here.model_copy(update={"layer_s": scaled, "platform": f"this machine as {role}"}),)
    return Platforms(
        profiles=profiles,
        link1_bps=paper.link1_bps,
        link2_bps=paper.link2_bps,
        input_bytes={"alexnet": here.cut_bytes[0]},
        name="this machine",
        origin="this machine as the edge; device and cloud as many times slower as in profile `paper`",
    )
