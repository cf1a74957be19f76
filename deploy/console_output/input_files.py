"""Input for a model from files: numpy arrays, and images that are resized and normalised for it."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bus.errors import ConfigError
from bus.tensors import Array
from deepar.protocol import TensorInfo
from stages.models.files.arrays import UNREADABLE

MAX_INPUT_BYTES = 1 << 30


@dataclass(frozen=True)
class Normalization:
    """An image's pixels p become (p - mean) / std, per channel or for all channels alike. Integer inputs get the pixels."""

    mean: tuple[float, ...] = field(default=(0.0,))
    std: tuple[float, ...] = field(default=(255.0,))


def read_input(name: str) -> Array | dict[str, Array] | bytes:
    """The content of a file, or of the standard input for `-`: an array (.npy), arrays by name (.npz), or an image's bytes.

    Raises `ConfigError`.
    """
    try:
        data = sys.stdin.buffer.read(MAX_INPUT_BYTES) if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"--input {name}: {error.strerror or error}") from None
    if not data:
        raise ConfigError(f"--input {name}: it is empty")
    if not data.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return data
    try:
        loaded: Any = np.load(io.BytesIO(data), allow_pickle=False)
        found = loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except UNREADABLE as error:
        raise ConfigError(f"--input {name}: not a readable numpy file: {error}") from None
    if isinstance(found, dict) and not (found and all(isinstance(array, np.ndarray) for array in found.values())):
        raise ConfigError(f"--input {name}: not a readable numpy file: it has other files than arrays, or none")
    return found


def image_array(name: str, data: bytes, wanted: TensorInfo, normalization: Normalization) -> Array:
    """An image as one sample of an input with the shape N x height x width x channels. Raises `ConfigError`."""
    try:
        from PIL import Image, UnidentifiedImageError  # imported here: arrays need no image library
    except ModuleNotFoundError:
        raise ConfigError(
            f"--input {name}: images need Pillow", remedy="python -m pip install 'deepar[images]', or pass a .npy file"
        ) from None
    _, height, width, channels = _image_shape(name, wanted)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            converted = picture.convert("L" if channels == 1 else "RGB")
            resized = converted.resize((width, height), Image.Resampling.BILINEAR)
    except UnidentifiedImageError:
        raise ConfigError(f"--input {name}: neither a numpy file (.npy, .npz) nor an image") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"--input {name}: not a readable image: {error}") from None
    pixels = np.asarray(resized, dtype=np.uint8).reshape(1, height, width, channels)
    dtype = np.dtype(wanted.dtype)
    if dtype == np.uint8:
        return pixels
    if dtype == np.int8:
        return (pixels.astype(np.int16) - 128).astype(np.int8)
    if dtype.kind != "f":
        raise ConfigError(f"--input {name}: input {wanted.name} has the type {wanted.dtype}; pass a .npy file")
    mean, std = (_per_channel(values, channels) for values in (normalization.mean, normalization.std))
    return ((pixels.astype(np.float64) - mean) / std).astype(dtype)


def _per_channel(values: Sequence[float], channels: int) -> Array:
    if len(values) not in (1, channels) or not np.isfinite(values).all():
        raise ConfigError(f"--mean and --std take one number, or one for each of the {channels} channels")
    return np.asarray(values, dtype=np.float64)


def _image_shape(name: str, wanted: TensorInfo) -> tuple[int, int, int, int]:
    shape = wanted.shape
    if len(shape) != 4 or shape[3] not in (1, 3) or min(shape[1:]) < 1:
        words = "x".join(map(str, shape))
        raise ConfigError(
            f"--input {name}: input {wanted.name} has the shape {words}, which no image has; pass a .npy file"
        )
    return 1, shape[1], shape[2], shape[3]
