"""Real inputs of the models of others that `codecs` measures: pieces of a portrait that matplotlib ships.

The models find landmarks of a face and of an eye. The face is moved, scaled, turned, mirrored and lit differently, so samples
are alike: an agreement on them says less than one on as many people.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageEnhance

from bus.tensors import Array


class Piece(NamedTuple):
    """A square of the portrait that shows what a model looks at, in pixels."""

    x: float  # of its centre
    y: float
    half: float  # half of its side
    size: int  # side of the model's input


FACE = Piece(265, 225, 130, 192)
EYE = Piece(222, 190, 50, 64)


def portrait_pieces(piece: Piece, count: int, rng: np.random.Generator) -> list[list[Array]]:
    """Samples of a model with one input, a picture of float32 in 0..1: the piece in `count` variants."""
    portrait = Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    return [[_variant(portrait, piece, rng)] for _ in range(count)]


def _variant(portrait: Image.Image, piece: Piece, rng: np.random.Generator) -> Array:
    half = piece.half * rng.uniform(0.85, 1.2)
    x, y = (centre + piece.half * rng.uniform(-0.15, 0.15) for centre in (piece.x, piece.y))
    turned = portrait.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, center=(x, y))
    box = (x - half, y - half, x + half, y + half)
    shown = turned.resize((piece.size, piece.size), Image.Resampling.BILINEAR, box=_inside(box, portrait.size))
    lit = ImageEnhance.Brightness(shown).enhance(rng.uniform(0.6, 1.3))
    pixels = np.asarray(lit, np.float32)[None] / np.float32(255)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if rng.random() < 0.5 else pixels


def _inside(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    left, upper, right, lower = box
    return max(left, 0.0), max(upper, 0.0), min(right, float(size[0])), min(lower, float(size[1]))
