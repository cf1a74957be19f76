"""The option of the experiments that names policies."""

from __future__ import annotations

from typing import Annotated

import typer

from bus.errors import ConfigError
from deploy.console_output import completion
from planner.search.policies import load_policy

Policies = Annotated[
    str,
    typer.Option(help="Names of policies, a,b,c; your own as module:name.", autocompletion=completion.policies),
]


def policy_names(text: str) -> tuple[str, ...]:
    """The names in the value of `--policies`, each once. Raises `ConfigError` for an unknown one."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError("--policies names no policy")
    for name in names:
        load_policy(name)
    return names
