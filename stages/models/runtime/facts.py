"""Facts about a model that only a trial run finds: shapes and missing kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RuntimeFacts:
    """Findings of a trial run of the main subgraph. Without findings, the shapes declared in the file apply."""

    # tensor -> shape that the runtime knew before running
    shapes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    # tensor -> shape found by running; None if it varied or was not found
    late: Mapping[int, tuple[int, ...] | None] = field(default_factory=dict)
    missing_kernels: frozenset[str] = frozenset()  # operators that the runtime cannot run

    def shape(self, tensor: int) -> tuple[int, ...] | None:
        """The shape that the trial run found; None if it varied or was not found."""
        known = self.shapes.get(tensor)
        return self.late.get(tensor) if known is None else known
