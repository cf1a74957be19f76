"""A batch on the GPU gives each sample its own results, also where tensors pass the segment untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.models.gpu.process import GpuProcess
from stages.models.gpu.segment_file import SegmentFile, batchable
from stages.models.segments.store import SegmentStore
from stages.models.slicer import slice_model
from stages.zoo.registry import load_model
from tests.unit.stages import built_models
from tests.unit.stages.models.gpu.drivers import program


@pytest.mark.parametrize("build", ["residual", "branches"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_each_sample_of_a_batch_has_its_own_results(tmp_path: Path, build: str, count: int) -> None:
    path = tmp_path / f"{build}.tflite"
    path.write_bytes(getattr(built_models, build)().to_bytes())
    model = load_model(path)
    store, process = SegmentStore(model), GpuProcess(program("scripted", error=0.0))
    inner = [cut.position for cut in model.manifest.cuts if len(cut.tensors) > 1 and cut.position < model.graph.depth]
    segment = store.get(inner[0], inner[-1] if inner[-1] > inner[0] else model.graph.depth)
    assert batchable(segment)
    rng = np.random.default_rng(3)
    samples = [[rng.random(spec.shape, np.float32) for spec in segment.inputs] for _ in range(count)]
    part = slice_model(model, segment.begin + 1, segment.end)
    file = SegmentFile(process, segment, part, batch=4)
    for inputs, outputs in zip(samples, file.run(samples), strict=True):
        for found, right in zip(outputs, segment.run(inputs), strict=True):
            assert found.shape == right.shape
            assert np.allclose(found, right, rtol=1e-6)
    process.close()
    store.close()
