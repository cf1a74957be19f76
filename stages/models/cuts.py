"""Cut positions that a stage prepares before the planner asks for them.

They only order the preparation: the planner's search covers every position.
"""

from __future__ import annotations

from itertools import accumulate

from bus.values import CutPoint, ModelManifest


def useful_positions(manifest: ModelManifest) -> tuple[int, ...]:
    """The Pareto front of work before a cut and bytes crossing it, with 0 and l added.

    A position is on the front if every earlier position sends more bytes. The planner still searches all positions, because
    the best cut depends on the pair of platforms.
    """
    smallest = None
    found = []
    for cut in manifest.cuts:
        if cut.cuttable and (smallest is None or cut.cut_bytes < smallest):
            smallest = cut.cut_bytes
            found.append(cut.position)
    return tuple(sorted({0, *found, manifest.layers}))


def work_shares(manifest: ModelManifest) -> list[float]:
    """For each position, the share of the model's work before it: 0 at position 0, 1 at position l."""
    done = list(accumulate(cut.work for cut in manifest.cuts))
    return [value / done[-1] if done[-1] else 0.0 for value in done]


def even_cuts(manifest: ModelManifest) -> tuple[int, int]:
    """Two inner positions that split the work into about three equal parts; a tie goes to the position with fewer bytes.

    Returns the same position twice if the model has only one inner position, and (0, 0), one piece, if it has none.
    """
    shares = work_shares(manifest)
    inner = [cut for cut in manifest.cuts if cut.cuttable and 0 < cut.position < manifest.layers]

    def nearest(cuts: list[CutPoint], share: float) -> int:
        best = min(cuts, key=lambda cut: (abs(shares[cut.position] - share), cut.cut_bytes), default=None)
        return 0 if best is None else best.position

    first = nearest(inner, 1 / 3)
    return first, nearest([cut for cut in inner if cut.position > first], 2 / 3) or first
