"""Two mappings of one area show the same values, also after it has grown."""

from __future__ import annotations

import os

import numpy as np

from stages.models.gpu.shared_area import SharedArea


def test_both_sides_see_the_same_values_and_the_halves_do_not_overlap() -> None:
    node = SharedArea()
    child = SharedArea(os.dup(node.descriptor))
    for input_values, output_values in ((3, 5), (1000, 5000), (2, 1)):
        for side in (node, child):
            side.grow(4 * input_values, 4 * output_values)
        inputs, _ = node.halves(4 * input_values, 4 * output_values)
        read, made = child.halves(4 * input_values, 4 * output_values)
        inputs[...] = np.arange(input_values)
        made[...] = -1.0
        assert read.tolist() == list(range(input_values))
        assert node.halves(4 * input_values, 4 * output_values)[1].tolist() == [-1.0] * output_values
    node.close()
    child.close()
    node.close()  # a second time closes no other file
