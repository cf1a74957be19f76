"""What is worth measuring in pairs and announcing: which codecs of a position, and which positions if a model has too many.

All nodes must come to the same choice, because a link needs a codec at both ends. So it depends on sizes, agreements and the
model alone, not on measured times.

Where room is short, positions come in the order of their usefulness for one link at any bandwidth. Sending b bytes takes
b / bandwidth, and the layers before a cut take their time on the sender instead of a multiple of it on the receiver; so the
delay of a cut is a constant plus a weighted sum of (work before it, bytes at it), with a positive weight of the bytes. The
best cut for some bandwidth and some ratio of speeds is therefore a corner of the lower hull of these points. Those on the
hull come first, then those on the hull of the others, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence

from bus.values import CodecProfile

WORTH_USING = 0.95
"""A codec that makes a position's tensors no smaller than this share of their bytes is not announced."""

WORTH_PAIRING = 0.9
"""Crossings with a lower agreement alone are not measured in pairs."""


def worth_using(found: Sequence[CodecProfile], raw_bytes: int) -> list[CodecProfile]:
    """The codecs of one position that are smaller than raw, and lossy ones only if they are smaller than lossless ones."""
    exact = min((one.bytes for one in found if one.codec.lossless), default=raw_bytes)
    return [
        one
        for one in found
        if one.bytes < WORTH_USING * raw_bytes and (one.codec.lossless or one.bytes < WORTH_USING * exact)
    ]


def worth_pairing(crossings: Sequence[CodecProfile], ranked: Sequence[int], most: int) -> list[CodecProfile]:
    """The lossy crossings, by position, whose pairs are measured: those of the most useful positions with `most` pairs.

    `ranked`: the positions, the most useful first.
    """
    lossy: dict[int, list[CodecProfile]] = {position: [] for position in ranked}
    for one in crossings:
        if one.agreement is not None and one.agreement >= WORTH_PAIRING:
            lossy[one.position].append(one)
    kept, pairs, members = set(), 0, 0
    for position in ranked:
        pairs += members * len(lossy[position])
        members += len(lossy[position])
        if pairs > most:
            break
        kept.add(position)
    return [one for position in sorted(kept) for one in lossy[position]]


def by_usefulness(work: Sequence[float], sizes: Sequence[float]) -> list[int]:
    """The indices of the points (work before a cut, bytes at it), the most useful first; see the module."""
    left = sorted(range(len(sizes)), key=lambda at: (work[at], sizes[at]))
    ranked: list[int] = []
    while left:
        hull: list[int] = []
        for at in left:
            while len(hull) > 1 and not _turns_left(work, sizes, hull[-2], hull[-1], at):
                hull.pop()
            hull.append(at)
        ranked += hull
        taken = set(hull)
        left = [at for at in left if at not in taken]
    return ranked


def _turns_left(x: Sequence[float], y: Sequence[float], first: int, second: int, third: int) -> bool:
    return (x[second] - x[first]) * (y[third] - y[first]) > (y[second] - y[first]) * (x[third] - x[first])
