"""SwiftShader, a Vulkan driver that needs no GPU, from Debian's package chromium, with the loader from libvulkan1.

Where either is missing, tests that ask for it are skipped and say so; DEEPAR_TEST_GPU=required makes that a failure.
"""

from __future__ import annotations

import ctypes.util
import os
from pathlib import Path

import pytest

DRIVER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
VARIABLES = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")
"""The loader's variables for the driver's file, in newer and in older versions."""


def use_software_gpu(patch: pytest.MonkeyPatch) -> None:
    """Make the driver the only one of this process's children. If it is missing, the test fails or is skipped."""
    missing = None
    if not DRIVER.exists():
        missing = f"there is no {DRIVER} (apt-get install chromium)"
    elif ctypes.util.find_library("vulkan") is None:
        missing = "there is no Vulkan loader (apt-get install libvulkan1)"
    if missing is not None and os.environ.get("DEEPAR_TEST_GPU") == "required":
        pytest.fail(f"DEEPAR_TEST_GPU=required, but {missing}", pytrace=False)
    if missing is not None:
        pytest.skip(missing)
    use_driver(patch, DRIVER)


def use_driver(patch: pytest.MonkeyPatch, path: Path) -> None:
    """Make the file's driver the only one of this process's children."""
    for variable in VARIABLES:
        patch.setenv(variable, str(path))
