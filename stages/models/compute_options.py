"""Values of `--num-threads` and `--batches`, apart from modules that load the inference runtime, which is slow."""

from __future__ import annotations

import contextlib
from typing import Literal, TypeAlias

from bus.errors import ConfigError

ThreadCount: TypeAlias = int | Literal["auto"]
"""Threads for one inference; `auto` chooses them for each model by measuring."""

BatchMode: TypeAlias = Literal["exact", "any", "off"]
"""exact: batches where their results are those of single samples to the bit; any: where they are nearly so; off: none."""


MOST_THREADS = 1024
"""Upper limit of threads for one inference. With 100,000 threads a stage had not started after a minute."""


def parse_threads(text: str, name: str = "--num-threads", *, most: int = MOST_THREADS) -> ThreadCount:
    """The value of the option `name`: `auto`, or a number from 1 to `most`. Raises `ConfigError`."""
    if text == "auto":
        return "auto"
    with contextlib.suppress(ValueError):
        number = int(text)
        if 1 <= number <= most:
            return number
    raise ConfigError(f"{name} {text}: must be auto or a number from 1 to {most}")
