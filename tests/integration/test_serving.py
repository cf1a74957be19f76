"""Public clients against the whole system on Kafka: every answer is bit by bit that of the model that is not cut.

`DEEPAR_TEST_MODELS` may list more `.tflite` files, separated by blanks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.zoo.registry import load_model
from tests.client_environment import Clients
from tests.clients.cases import save
from tests.integration.serving_system import System, random_inputs, serving_system, uncut
from tests.unit.stages.built_models import two_in_three_out

SAMPLES = 2
MODELS = ("lenet", "alexnet", "two.tflite", *os.environ.get("DEEPAR_TEST_MODELS", "").split())
"""A face landmark model of others comes with the environment of the clients."""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, clients: Clients) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("system")
    (folder / "two.tflite").write_bytes(two_in_three_out().to_bytes())
    with serving_system(folder, (*MODELS, str(clients.face_landmark))) as made:
        yield made


@pytest.fixture(scope="module")
def cases(system: System) -> Path:
    """A folder with inputs and expected outputs of each model."""
    folder = system.processes.folder / "cases"
    folder.mkdir()
    for name in system.models:
        model = load_model(system.processes.folder / name if name.endswith(".tflite") else name)
        save(folder, uncut(model, random_inputs(model, SAMPLES, seed=15)))
    return folder


async def test_tritonclient_gets_the_answers_of_the_uncut_models_wherever_they_are_computed(
    clients: Clients, system: System, cases: Path
) -> None:
    done = await clients.run("triton_calls", str(cases), system.http, system.grpc, "placements")
    assert done["answers"] == len(system.models) * (41 + 6)
    assert done["refusals"] == 16
    assert {"device", "edge", "cloud"} <= set(done["kinds"])


async def test_kserve_gets_the_answers_of_the_uncut_models(clients: Clients, system: System, cases: Path) -> None:
    done = await clients.run("kserve_calls", str(cases), system.http, system.grpc)
    assert done == {"answers": 4 * len(system.models), "refusals": 2}
