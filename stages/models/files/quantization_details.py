"""Quantisation details that refer to other tensors: scales and zero points outside the operators' inputs.

The kernel reads these tensors together with the weights, so a slice with the weights must contain them too.
"""

from __future__ import annotations

from math import prod
from typing import Any

SCALES, ZERO_POINTS = "scales", "zeroPoints"
FIELDS = (SCALES, ZERO_POINTS)
"""The fields of a details table that hold the index of a tensor of the same subgraph."""


def details_of(tensor: Any) -> Any:
    """The table of quantisation details if it refers to tensors, else None."""
    details = None if tensor.quantization is None else tensor.quantization.details
    return details if hasattr(details, SCALES) else None


def named_tensors(tensors: list[Any], index: int) -> dict[str, int]:
    """Field -> index of the tensor that it refers to, for one tensor of a subgraph; indices are not validated.

    Zero points are absent if the index is -1, or if it is 0 (the default) and tensor 0 has another size than the scales.
    """
    details = details_of(tensors[index])
    if details is None:
        return {}
    scales, zeros = int(details.scales), int(details.zeroPoints)
    if zeros == -1 or (zeros == 0 and not _same_count(tensors, scales, zeros)):
        return {SCALES: scales}
    return {SCALES: scales, ZERO_POINTS: zeros}


def with_named_tensors(tensors: list[Any], chosen: set[int]) -> set[int]:
    """`chosen` and all tensors that their quantisation details refer to, directly or indirectly."""
    found: set[int] = set()
    waiting = list(chosen)
    while waiting:
        index = waiting.pop()
        if index not in found:
            found.add(index)
            waiting.extend(named_tensors(tensors, index).values())
    return found


def elements(tensor: Any) -> int:
    """Number of elements of the declared shape; 0 if a dimension is open."""
    return prod(max(int(size), 0) for size in (() if tensor.shape is None else tensor.shape))


def _same_count(tensors: list[Any], left: int, right: int) -> bool:
    return 0 <= left < len(tensors) and left != right and elements(tensors[left]) == elements(tensors[right])
