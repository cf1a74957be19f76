"""What only running a model can tell about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RuntimeFacts:
    """Findings of a trial run of the main subgraph. Without one, a file's declarations are taken at their word."""

    shapes: Mapping[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # tensor -> shape, where the runtime knew it before
    late: Mapping[int, tuple[int, ...] | None] = field(
        default_factory=dict
    )  # -> shape that turned out, None if several did
    missing_kernels: frozenset[str] = frozenset()  # operators that the runtime cannot run

    def shape(self, tensor: int) -> tuple[int, ...] | None:
        """The shape that the trial saw, None where it saw none or several."""
        known = self.shapes.get(tensor)
        return self.late.get(tensor) if known is None else known
