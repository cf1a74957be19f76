"""Profile files: the model times of a device, an edge and a cloud, and the bandwidths between them.

`plan`, simulations and modelled stages use them. One file is shipped, `paper`; `loadgen.experiments.fit_paper` describes the
origin of its numbers. A user's file has the same keys:

    {"version": 1, "name": ..., "origin": ..., "link1_bps": ..., "link2_bps": ..., "input_bytes": {MODEL: ...},
     "device": [ModelProfile, ...], "edge": [...], "cloud": [...]}

and, for a profile that was fitted to figures, `"fitted_to": [FIGURE, ...], "fit_seeds": [...]`.

Models of a fitted profile have no weights, so no codec can be measured on them. `with_codecs` gives them the sizes, times and
agreements that were measured on trained models (`planner/data/codecs.json`, which says on which).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from bus.errors import ConfigError, unknown_name
from bus.values import Codec, CodecProfile, ModelProfile, PairAgreement

PROFILE_VERSION: Final = 1
SHIPPED: Final = ("paper",)


@dataclass(frozen=True, slots=True)
class PlatformProfiles:
    """The profiles of some models on a device, an edge and a cloud, and the bandwidths of the links between them."""

    name: str
    origin: str  # where the numbers come from, for people
    device: dict[str, ModelProfile]  # by model
    edge: dict[str, ModelProfile]
    cloud: dict[str, ModelProfile]
    link1_bps: int  # default of b1
    link2_bps: int  # default of b2
    input_bytes: dict[str, int]  # G(0) by model, for models whose G(0) differs from the model's own
    fitted_to: tuple[str, ...] = ()  # figures whose statements the numbers were fitted to; empty for measured profiles
    fit_seeds: tuple[int, ...] = ()  # random seeds that the fit used; an evaluation must use other seeds
    assumed: str = ""  # where assumed codecs come from, for people; empty if they were measured, or there are none

    @property
    def models(self) -> list[str]:
        """The models that all three platforms run, in the file's order."""
        return [model for model in self.device if model in self.edge and model in self.cloud]


def load_profile(name_or_path: str | Path) -> PlatformProfiles:
    """A shipped profile by name, or the user's file at a path.

    Raises `UnknownNameError` if neither exists, and `ConfigError` for an invalid file; the message names it.
    """
    name = str(name_or_path)
    return parse_profile(name, profile_text(name))


def with_codecs(found: PlatformProfiles) -> PlatformProfiles:
    """The profiles with the codecs that they have measured; a fitted profile gets assumed ones.

    Raises `ConfigError` for a profile that is not fitted and has measured no codecs.
    """
    if any(profile.codecs is not None for tier in (found.device, found.edge, found.cloud) for profile in tier.values()):
        return found
    if not found.fitted_to:
        raise ConfigError(
            f"profile {found.name} has no codecs",
            remedy="measure them with: deepar profile MODEL --codecs --calibration FILE.npz",
        )
    assumed = _AssumedCodecs.load()
    return replace(_with_each(found, assumed.added_to), assumed=assumed.origin)


def without_codecs(found: PlatformProfiles) -> PlatformProfiles:
    """The profiles without their codecs."""
    none = {"codecs": None, "agreements": None, "calibration_samples": None}
    return _with_each(found, lambda profile: profile.model_copy(update=none))


def _with_each(found: PlatformProfiles, changed: Callable[[ModelProfile], ModelProfile]) -> PlatformProfiles:
    device, edge, cloud = (
        {model: changed(profile) for model, profile in tier.items()} for tier in (found.device, found.edge, found.cloud)
    )
    return replace(found, device=device, edge=edge, cloud=cloud)


@dataclass(frozen=True, slots=True)
class _AssumedCodecs:
    """What codecs do to the activations of a model whose own were not measured, at every cut inside it."""

    origin: str
    codecs: tuple[Mapping[str, Any], ...]
    pairs: tuple[Mapping[str, Any], ...]  # of lossy codecs on both links

    @classmethod
    def load(cls) -> _AssumedCodecs:
        found = json.loads(files("planner").joinpath("data", "codecs.json").read_text(encoding="utf-8"))
        return cls(found["origin"], tuple(found["codecs"]), tuple(found["pairs"]))

    def added_to(self, profile: ModelProfile) -> ModelProfile:
        """The profile with these codecs."""
        cuts = [cut for cut in range(1, profile.layers) if cut not in profile.forbidden]
        codecs = tuple(
            CodecProfile(
                position=cut,
                codec=Codec(one["codec"]),
                bytes=math.ceil(profile.cut_bytes[cut] / one["ratio"]),
                encode_s=one["encode_call_s"] + profile.cut_bytes[cut] / one["encode_bytes_per_s"],
                decode_s=one["decode_call_s"] + profile.cut_bytes[cut] / one["decode_bytes_per_s"],
                agreement=one["agreement"],
            )
            for cut in cuts
            for one in self.codecs
        )
        agreements = tuple(
            PairAgreement(position1=cut1, position2=cut2, **pair)
            for cut1 in cuts
            for cut2 in cuts
            if cut1 < cut2
            for pair in self.pairs
        )
        return ModelProfile.model_validate(profile.model_copy(update={"codecs": codecs, "agreements": agreements}))


def profile_text(name: str) -> str:
    """The content of a profile file. Raises `UnknownNameError` or `ConfigError` as `load_profile` does."""
    if name in SHIPPED:
        return files("planner").joinpath("data", f"{name}.json").read_text(encoding="utf-8")
    path = Path(name)
    if not path.is_file():
        if path.exists():
            raise ConfigError(f"profile {name} is a folder, not a JSON file")
        raise unknown_name("profile", name, SHIPPED, remedy=f"name {' or '.join(SHIPPED)}, or the path of a JSON file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {name} cannot be read: {error}") from error


def parse_profile(name: str, text: str) -> PlatformProfiles:
    """A profile from the content of its file. Raises `ConfigError` naming `name`."""
    try:
        found: dict[str, Any] = json.loads(text)
        if found.get("version") != PROFILE_VERSION:
            raise ConfigError(
                f"profile {name} has version {found.get('version')}; write it in version {PROFILE_VERSION}"
            )
        tiers = {
            tier: {entry["model"]: ModelProfile.model_validate(entry) for entry in found[tier]}
            for tier in ("device", "edge", "cloud")
        }
        return PlatformProfiles(
            name=found["name"],
            origin=found.get("origin", ""),
            link1_bps=int(found["link1_bps"]),
            link2_bps=int(found["link2_bps"]),
            input_bytes={model: int(size) for model, size in found.get("input_bytes", {}).items()},
            fitted_to=tuple(str(figure) for figure in found.get("fitted_to", ())),
            fit_seeds=tuple(int(seed) for seed in found.get("fit_seeds", ())),
            device=tiers["device"],
            edge=tiers["edge"],
            cloud=tiers["cloud"],
        )
    except KeyError as error:
        raise ConfigError(f"profile {name} is broken: it has no key {error}") from error
    except (json.JSONDecodeError, TypeError, AttributeError, ValidationError) as error:
        raise ConfigError(f"profile {name} is broken: {error}") from error
