"""Random numbers: one seed, and one independent stream for each quantity that is drawn.

Streams are told apart by name, so that drawing more of one quantity, or adding a quantity, changes no other:
two scenarios that differ in the number of edges still have the same tasks arriving at the same times.
"""

from __future__ import annotations

import numpy as np


class Streams:
    """The streams of one seed. The same (seed, name) always gives the same numbers."""

    def __init__(self, seed: int) -> None:
        """Raises ValueError for a negative seed."""
        if seed < 0:
            raise ValueError(f"a seed is not negative: {seed}")
        self.seed = seed
        self.names: list[str] = []  # in the order of their first use, for the report

    def stream(self, name: str) -> np.random.Generator:
        """A fresh generator for the quantity `name`, at its beginning."""
        if name not in self.names:
            self.names.append(name)
        # The name's bytes become part of the entropy; numpy hashes them thoroughly (SeedSequence).
        return np.random.default_rng(np.random.SeedSequence([self.seed, *name.encode()]))

    def describe(self) -> str:
        """One line that says what to type to get the same numbers again."""
        return f"seed {self.seed}; streams: {', '.join(self.names) or 'none'}"
