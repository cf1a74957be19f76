"""Values of `--num-threads` and `--batches`, apart from modules that load the inference runtime, which is slow."""

from __future__ import annotations

import contextlib
from typing import Literal, TypeAlias

from bus.errors import ConfigError

ThreadCount: TypeAlias = int | Literal["auto"]
"""Threads for one inference; `auto` chooses them for each model by measuring."""

BatchMode: TypeAlias = Literal["exact", "any", "off"]
"""exact: batches where their results are those of single samples to the bit; any: where they are nearly so; off: none."""


def parse_threads(text: str, name: str = "--num-threads", *, most: int | None = None) -> ThreadCount:
    """The value of the option `name`: `auto`, or a number from 1 to `most`. Raises `ConfigError`."""
    if text == "auto":
        return "auto"
    with contextlib.suppress(ValueError):
        number = int(text)
        if number >= 1 and (most is None or number <= most):
            return number
    limits = "of at least 1" if most is None else f"from 1 to {most}"
    raise ConfigError(f"{name} {text}: must be auto or a number {limits}")
