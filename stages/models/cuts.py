"""Which of a model's positions are worth preparing for."""

from __future__ import annotations

from itertools import accumulate

from bus.values import CutPoint, ModelManifest


def useful_positions(manifest: ModelManifest) -> tuple[int, ...]:
    """The Pareto front of work before a cut and bytes crossing it, 0 and l included.

    A position is on it when no earlier one sends as few bytes. It orders preparation only: the planner's search covers every
    position, since a useful cut for one pair of platforms need not be one for another.
    """
    smallest = None
    found = []
    for cut in manifest.cuts:
        if cut.cuttable and (smallest is None or cut.cut_bytes < smallest):
            smallest = cut.cut_bytes
            found.append(cut.position)
    return tuple(sorted({0, *found, manifest.layers}))


def work_shares(manifest: ModelManifest) -> list[float]:
    """The share of the model's work that lies before each position: 0 at 0, 1 at l."""
    done = list(accumulate(cut.work for cut in manifest.cuts))
    return [value / done[-1] if done[-1] else 0.0 for value in done]


def even_cuts(manifest: ModelManifest) -> tuple[int, int]:
    """Two inner positions that leave the three parts about the same work; of two that are as good, the one with fewer bytes.

    One position twice where the model has no other, 0 where it has none: it then stays in one piece.
    """
    shares = work_shares(manifest)
    inner = [cut for cut in manifest.cuts if cut.cuttable and 0 < cut.position < manifest.layers]

    def nearest(cuts: list[CutPoint], share: float) -> int:
        best = min(cuts, key=lambda cut: (abs(shares[cut.position] - share), cut.cut_bytes), default=None)
        return 0 if best is None else best.position

    first = nearest(inner, 1 / 3)
    return first, nearest([cut for cut in inner if cut.position > first], 2 / 3) or first
