"""A model with a large input and hardly any work: what it costs to serve it is the endpoint's own cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from stages.models.files.graph_builder import GraphBuilder

SHAPE = (1, 227, 227, 3)  # 618 kB of float32, AlexNet's input


def write_wide_model(path: Path) -> None:
    """Write a model that returns the mean of each channel of an image."""
    graph = GraphBuilder("mean of each channel")
    image = graph.input("image", SHAPE)
    axes = graph.constant("axes", np.array([1, 2], dtype=np.int32))
    means = graph.tensor("means", (1, SHAPE[3]))
    graph.operator("MEAN", [image, axes], [means], schema.ReducerOptionsT(keepDims=False))
    graph.output(means)
    path.write_bytes(graph.to_bytes())
