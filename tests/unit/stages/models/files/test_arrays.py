"""Arrays that a user gives in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bus.errors import ConfigError
from stages.models.files.arrays import stored_arrays


@pytest.mark.parametrize("at", [60, 200, 1000])
def test_a_file_that_is_damaged_in_the_middle_is_named_when_its_array_is_read(tmp_path: Path, at: int) -> None:
    """The packing, the header of the array, or only its sum is wrong."""
    file = tmp_path / "weights.npz"
    np.savez_compressed(file, w=np.arange(4096.0))
    content = bytearray(file.read_bytes())
    content[at : at + 100] = bytes(100)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"weights\.npz cannot be read"), stored_arrays(file) as arrays:
        _ = arrays["w"]


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ConfigError, match=r"one\.npy holds one array"), stored_arrays(tmp_path / "one.npy"):
        pass
