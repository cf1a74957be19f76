"""A cache folder for one run of the tests: AlexNet is generated once, trial runs are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.models.model import Model
from stages.zoo.registry import load_model


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that `DEEPAR_CACHE_DIR` names while the tests of this room run."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPAR_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def lenet(cache: Path) -> Model:
    """LeNet, loaded."""
    return load_model("lenet")


@pytest.fixture(scope="session")
def alexnet(cache: Path) -> Model:
    """AlexNet, generated into the tests' own cache."""
    return load_model("alexnet")
