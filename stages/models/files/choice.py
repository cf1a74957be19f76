"""The user's choice of a signature and input shapes for a model file.

The command line imports this module at every start, so its imports must stay light.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from bus.errors import ConfigError

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class ModelChoice:
    """The signature and the input shapes that a user chose for a model."""

    signature: str | None = None  # None: the first signature of the main subgraph
    input_shapes: Mapping[str, Shape] = field(
        default_factory=dict
    )  # name of the tensor, or its name in the signature -> shape

    def __bool__(self) -> bool:
        return self.signature is not None or bool(self.input_shapes)


def shape_words(shape: Iterable[int]) -> str:
    """`1x1280`, with a question mark for a dimension of -1."""
    return "x".join("?" if size < 0 else str(size) for size in shape)


def parse_shapes(words: Iterable[str]) -> dict[str, Shape]:
    """Parses one `NAME=1x1280` per input. Raises `ConfigError`."""
    shapes: dict[str, Shape] = {}
    for word in words:
        name, _, sizes = word.rpartition("=")
        if not name or not re.fullmatch(r"[1-9]\d{0,9}(x[1-9]\d{0,9})*", sizes):
            raise ConfigError(f"--input-shape {word}: write NAME=1x1280, an input's name and its dimensions")
        if name in shapes:
            raise ConfigError(f"--input-shape {word}: {name} has a shape already; give each input once")
        shapes[name] = tuple(int(size) for size in sizes.split("x"))
    return shapes
