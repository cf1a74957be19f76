"""The samples that codecs are measured with: a file of the user, or the digits that LeNet was not trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bus.errors import ConfigError
from bus.tensors import Array
from stages.models.files.metadata import read_metadata
from stages.models.model import Model
from stages.models.verify import named_inputs
from stages.zoo.networks import LENET
from stages.zoo.registry import SHA256, digits

LABELS = "labels"
"""Array of a calibration file whose presence says that the model's outputs are classes. Its content is not read."""

CLASSIFYING = ("SOFTMAX", "LOG_SOFTMAX")
"""Kinds of a last layer that makes classes."""


@dataclass(frozen=True)
class Calibration:
    """Real inputs of a model."""

    samples: Sequence[Sequence[Array]]  # the tensors of each
    classes: bool  # whether outputs are compared by their best class, otherwise by their relative error
    file: Path | None = None  # None: supplied with DeePar

    @property
    def lowest_proven(self) -> float:
        """What an agreement of 1.0 on these samples proves, with 95 % confidence (the rule of three)."""
        return max(0.0, 1.0 - 3.0 / len(self.samples))


def calibration_of(model: Model, file: Path | None) -> Calibration:
    """The samples of an .npz file, in the form of `named_inputs`; without one, those supplied for the model.

    Raises `ConfigError` if the file is wrong, or if there is none and the model has no supplied samples.
    """
    if file is not None:
        arrays = _arrays(file)
        labelled = arrays.pop(LABELS, None) is not None
        samples = named_inputs(model, arrays)
        if not samples:
            raise ConfigError(f"{file} has no samples")
        return Calibration(samples, labelled or has_classes(model), file.absolute())
    if model.sha256 != SHA256[LENET.name]:
        raise ConfigError(
            f"{model.name} has no calibration samples of its own",
            remedy="give real inputs with --calibration FILE.npz, which has an array for each input of the model",
        )
    images, _ = digits()
    return Calibration([[image[None]] for image in images], classes=True)


def has_classes(model: Model) -> bool:
    """Whether the model says that its outputs are classes: it ends in a softmax, or its file names the classes."""
    kinds = [layer.kind for layer in model.graph.layers if layer.kind not in ("DEQUANTIZE", "QUANTIZE", "RESHAPE")]
    metadata = read_metadata(model.data)
    return bool(kinds and kinds[-1] in CLASSIFYING) or bool(metadata and metadata.labels)


def _arrays(file: Path) -> dict[str, Array]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            if isinstance(stored, np.lib.npyio.NpzFile):
                return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"the calibration file {file} cannot be read as an .npz file: {error}") from error
    raise ConfigError(f"{file} holds one array, not arrays by name; save it with numpy.savez")
