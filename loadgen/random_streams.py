"""Random streams: one independent generator per random quantity, all from one seed.

A stream is identified by its name. Drawing more values of one quantity, or adding a quantity, does not change the others: two
scenarios that differ in the number of edges have the same tasks with the same arrival times.
"""

from __future__ import annotations

import numpy as np


class Streams:
    """The streams of one seed. The same (seed, name) always gives the same numbers."""

    def __init__(self, seed: int) -> None:
        """Raises ValueError for a negative seed."""
        if seed < 0:
            raise ValueError(f"the seed must not be negative: {seed}")
        self.seed = seed
        self.names: list[str] = []  # in the order of their first use, for the report

    def stream(self, name: str) -> np.random.Generator:
        """A fresh generator for the quantity `name`, at the start of its stream."""
        if name not in self.names:
            self.names.append(name)
        # The name's bytes become part of the entropy; numpy hashes them (SeedSequence).
        return np.random.default_rng(np.random.SeedSequence([self.seed, *name.encode()]))

    def describe(self) -> str:
        """One line with the seed and the streams used, for reproducing a run."""
        return f"seed {self.seed}; streams: {', '.join(self.names) or 'none'}"
