"""Arrays that a user gives in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bus.errors import ConfigError
from deploy.console_output.model_loading import stored_arrays


def test_a_file_that_is_damaged_in_the_middle_is_named_when_its_array_is_read(tmp_path: Path) -> None:
    file = tmp_path / "weights.npz"
    np.savez_compressed(file, w=np.random.default_rng(1).random((1, 4096)))
    content = bytearray(file.read_bytes())
    content[2000:2100] = bytes(100)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"weights\.npz cannot be read"), stored_arrays(file) as arrays:
        _ = arrays["w"]
