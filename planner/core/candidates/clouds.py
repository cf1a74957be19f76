"""Which cloud node runs the layers of a task.

The cloud nodes form one consumer group, so any of them may serve a task. The prediction uses the one that served the edge's
last task if this is known, otherwise the one with the fastest profile.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.core.region.state import RegionState
from planner.learning.table import EstimateTable
from planner.search.cost import PlatformRow


class Clouds:
    """The cloud nodes of a region, by the model (name and hash) that they run; cached until `forget`."""

    def __init__(self, region: RegionState, estimates: EstimateTable) -> None:
        self._region = region
        self._nodes = region.nodes
        self._estimates = estimates
        self._fastest: dict[tuple[str, str], str | None] = {}

    def row(self, node: str, model: str, sha256: str) -> PlatformRow | None:
        """The profile row of a model on a node of any role."""
        row = self._nodes[node].rows.get(model)
        return row if row is not None and row.sha256 == sha256 else None

    def fastest_row(self, model: str, sha256: str) -> PlatformRow | None:
        """The profile row of the fastest cloud node that does not drain; of equally fast ones, the first by name."""
        name = self._fastest_name(model, sha256)
        return None if name is None else self.row(name, model, sha256)

    def fastest_row_of(self, names: Iterable[str], model: str, sha256: str) -> PlatformRow | None:
        """As `fastest_row`, among these cloud nodes; the result is not cached."""
        name = self._fastest_of(names, model, sha256)
        return None if name is None else self.row(name, model, sha256)

    def predicted(self, edge: str, model: str, sha256: str) -> str | None:
        """The cloud node that the prediction for an edge uses."""
        last = self._estimates.served.get(edge)
        node = None if last is None else self._nodes.get(last)
        if last is not None and node is not None and not node.draining and self.row(last, model, sha256) is not None:
            return last
        return self._fastest_name(model, sha256)

    def forget(self) -> None:
        """Clear the cache: a cloud node joined, changed or left."""
        self._fastest.clear()

    def _fastest_name(self, model: str, sha256: str) -> str | None:
        key = model, sha256
        if key not in self._fastest:
            staying = [name for name in self._region.cloud_names if not self._nodes[name].draining]
            self._fastest[key] = self._fastest_of(staying, model, sha256)
        return self._fastest[key]

    def _fastest_of(self, names: Iterable[str], model: str, sha256: str) -> str | None:
        rows = [(row.compute_s[-1], name) for name in names if (row := self.row(name, model, sha256)) is not None]
        return min(rows, default=(0.0, None))[1]
