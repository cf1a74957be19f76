"""Simulated platforms: model profiles of device, edge and cloud, and the link rates of the one-task experiments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from bus.errors import unknown_name
from bus.values import ModelProfile, Role
from planner.search.profiles import parse_profile, profile_text, with_codecs, without_codecs

FIRST_VERDICT_SEED = 10
"""First seed used for the verdicts of figures; lower seeds are reserved for fits and trials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Platforms:
    """Profiles by tier, and the links and input sizes of the one-task experiments."""

    profiles: Mapping[Role, tuple[ModelProfile, ...]]  # profiles that nodes of each tier announce
    link1_bps: int  # b1 of Figures 1(a) and 3
    link2_bps: int  # b2
    input_bytes: Mapping[str, int]  # G(0) of one sample in Figures 1(a) and 3, by model
    name: str  # name in error messages
    origin: str  # source of the numbers, for notes beside plots
    assumed: str = ""  # source of assumed codecs, for notes; empty: there are none, or they were measured
    fitted_to: tuple[str, ...] = ()  # figures to whose statements the numbers were fitted
    fit_seeds: tuple[int, ...] = ()  # seeds that the fit used; verdicts use different ones

    def unused_seeds(self, count: int) -> tuple[int, ...]:
        """The first `count` seeds from `FIRST_VERDICT_SEED` on that the fit did not use."""
        numbers = (seed for seed in itertools.count(FIRST_VERDICT_SEED) if seed not in self.fit_seeds)
        return tuple(itertools.islice(numbers, count))

    def require(self, models: Iterable[str]) -> None:
        """Raise `UnknownNameError` for a model without a profile on any tier; its tasks could not be placed."""
        known = list(dict.fromkeys(profile.model for profiles in self.profiles.values() for profile in profiles))
        for model in models:
            if model not in known:
                raise unknown_name(f"model in {self.name} called", model, known)

    def model(self, role: Role, name: str) -> ModelProfile:
        """Profile of one model on one tier. Raises `UnknownNameError`."""
        for profile in self.profiles[role]:
            if profile.model == name:
                return profile
        raise unknown_name(f"model profiled on the {role} called", name, [one.model for one in self.profiles[role]])


def platforms(name: str, *, codecs: bool = False) -> Platforms:
    """Load the platforms of a profile by name (`paper`) or file. Raises `UnknownNameError`, `ConfigError`.

    `codecs`: with codecs on the links, see `planner.search.profiles.with_codecs`.
    """
    return _platforms(name, profile_text(name), codecs)


@lru_cache(maxsize=8)
def _platforms(name: str, text: str, codecs: bool) -> Platforms:
    found = parse_profile(name, text)
    found = with_codecs(found) if codecs else without_codecs(found)
    origin = f"profile {found.name}" + (f": {found.origin}" if found.origin else "")
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
        origin=origin + (f"; {found.assumed}" if found.assumed else ""),
        assumed=found.assumed,
        fitted_to=found.fitted_to,
        fit_seeds=found.fit_seeds,
    )


def measured(progress: Callable[[str, int, int], None] | None = None) -> Platforms:
    """Measure AlexNet layer by layer on this machine and use the result as the edge.

    The profiles of the device and the cloud are scaled from it by the factors of the `paper` profile; links and input
    are the paper's. Takes seconds; the first call also generates AlexNet's weights. Raises `ModelError`.
    """
    from stages.models.profiler import machine_profile
    from stages.zoo.registry import load_model

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
