"""What a user says about a model that its file leaves open. Light to import: the command line reads it at every start."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from bus.errors import ConfigError

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What a user says about a model."""

    signature: str | None = None  # None: the first one of the main subgraph
    input_shapes: Mapping[str, Shape] = field(
        default_factory=dict
    )  # tensor's name, or the signature's name for it -> shape

    def __bool__(self) -> bool:
        return self.signature is not None or bool(self.input_shapes)


def shape_words(shape: Iterable[int]) -> str:
    """`1x1280`, with a question mark for a dimension of -1."""
    return "x".join("?" if size < 0 else str(size) for size in shape)


def parse_shapes(words: Iterable[str]) -> dict[str, Shape]:
    """`NAME=1x1280` for each input. Raises `ConfigError`."""
    shapes: dict[str, Shape] = {}
    for word in words:
        name, _, sizes = word.rpartition("=")
        if not name or not re.fullmatch(r"[1-9]\d{0,9}(x[1-9]\d{0,9})*", sizes):
            raise ConfigError(f"--input-shape {word}: write NAME=1x1280, an input's name and its dimensions")
        if name in shapes:
            raise ConfigError(f"--input-shape {word}: {name} has a shape already")
        shapes[name] = tuple(int(size) for size in sizes.split("x"))
    return shapes
