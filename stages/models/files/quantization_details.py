"""Quantisation details that name tensors by their index: scales and zero points that no operator lists as an input.

The kernel looks them up in the subgraph when it reads the weights, so they belong to the weights wherever those go.
"""

from __future__ import annotations

from math import prod
from typing import Any

SCALES, ZERO_POINTS = "scales", "zeroPoints"
FIELDS = (SCALES, ZERO_POINTS)
"""The fields of a details table that hold the index of a tensor of the same subgraph."""


def details_of(tensor: Any) -> Any:
    """The table of quantisation details if it names tensors, else None."""
    details = None if tensor.quantization is None else tensor.quantization.details
    return details if hasattr(details, SCALES) else None


def named_tensors(tensors: list[Any], index: int) -> dict[str, int]:
    """Field -> index of the tensor that it names, for one tensor of a subgraph; indices are as the file has them.

    Zero points are absent at -1. They are at 0 too, the field's default, unless tensor 0 fits the scales.
    """
    details = details_of(tensors[index])
    if details is None:
        return {}
    scales, zeros = int(details.scales), int(details.zeroPoints)
    if zeros == -1 or (zeros == 0 and not _same_count(tensors, scales, zeros)):
        return {SCALES: scales}
    return {SCALES: scales, ZERO_POINTS: zeros}


def with_named_tensors(tensors: list[Any], chosen: set[int]) -> set[int]:
    """`chosen` and every tensor that its quantisation details name, directly or through one another."""
    found: set[int] = set()
    waiting = list(chosen)
    while waiting:
        index = waiting.pop()
        if index not in found:
            found.add(index)
            waiting.extend(named_tensors(tensors, index).values())
    return found


def elements(tensor: Any) -> int:
    """How many elements the declared shape has; 0 where it is open."""
    return prod(max(int(size), 0) for size in (() if tensor.shape is None else tensor.shape))


def _same_count(tensors: list[Any], left: int, right: int) -> bool:
    return 0 <= left < len(tensors) and left != right and elements(tensors[left]) == elements(tensors[right])
