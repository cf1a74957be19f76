"""Profile files: the model times of a device, an edge and a cloud, and the bandwidths between them.

`plan`, simulations and modelled stages use them. One file is shipped, `paper`; `loadgen.experiments.fit_paper` describes the
origin of its numbers. A user's file has the same keys:

    {"version": 1, "name": ..., "origin": ..., "link1_bps": ..., "link2_bps": ..., "input_bytes": {MODEL: ...},
     "device": [ModelProfile, ...], "edge": [...], "cloud": [...]}

and, for a profile that was fitted to figures, `"fitted_to": [FIGURE, ...], "fit_seeds": [...]`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from bus.errors import ConfigError, unknown_name
from bus.values import ModelProfile

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
            **tiers,
        )
    except KeyError as error:
        raise ConfigError(f"profile {name} is broken: it has no key {error}") from error
    except (json.JSONDecodeError, TypeError, AttributeError, ValidationError) as error:
        raise ConfigError(f"profile {name} is broken: {error}") from error
