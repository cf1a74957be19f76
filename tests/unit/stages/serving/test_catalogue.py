"""Served models: what clients see of a model file."""

from __future__ import annotations

from pathlib import Path

from stages.models.model import read_model
from stages.serving.catalogue import served_model
from tests.unit.stages.models.files.test_metadata import LABELS, LENET, packed_metadata, with_metadata
from tests.unit.stages.serving.fake_inference import FakeInference
from tests.unit.stages.serving.http.client import rest_server


async def test_clients_see_the_labels_and_the_normalisation_of_a_file_that_has_them(tmp_path: Path) -> None:
    file = tmp_path / "digits.tflite"
    file.write_bytes(with_metadata(packed_metadata()))
    async with rest_server(FakeInference(info=served_model(read_model(file)).info)) as client:
        answer = await client.ask("GET", "/v2/models/digits")
    assert answer.json["parameters"] == {"labels": LABELS, "mean": [127.5], "std": [127.0]}


async def test_a_file_without_metadata_has_no_parameters() -> None:
    async with rest_server(FakeInference(info=served_model(read_model(LENET)).info)) as client:
        answer = await client.ask("GET", "/v2/models/lenet")
    assert "parameters" not in answer.json
