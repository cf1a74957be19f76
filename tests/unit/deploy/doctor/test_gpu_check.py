"""`deepar doctor` tries the GPU where one is asked for, and warns where the CPU would compute instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.doctor.machine_checks import gpu
from tests.software_gpu import use_driver, use_software_gpu


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("environment", [{}, {"DEEPAR_ACCELERATOR": "cpu"}])
def test_no_gpu_is_looked_for_unless_asked(environment: dict[str, str]) -> None:
    assert gpu(environment) == []


def test_a_missing_driver_is_a_warning_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(monkeypatch, tmp_path / "none.json")
    (check,) = gpu({"DEEPAR_ACCELERATOR": "gpu"})
    assert check.state == "warning"
    assert "no usable GPU" in check.detail
    assert "libvulkan1" in check.remedy


def test_a_driver_that_computes_right_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_software_gpu(monkeypatch)
    (check,) = gpu({"DEEPAR_ACCELERATOR": "auto"})
    assert check.state == "ok"
    assert "same results" in check.detail
