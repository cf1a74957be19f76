"""The samples that codecs are measured with: a file of the user, or the digits that LeNet was not trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bus.errors import ConfigError
from bus.tensors import Array
from stages.models.files.arrays import stored_arrays
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


def lowest_proven(samples: int) -> float:
    """The least agreement, with 95 % confidence, of outputs that agree on all of `samples` samples (the rule of three)."""
    return max(0.0, 1.0 - 3.0 / samples)


def calibration_of(model: Model, file: Path | None) -> Calibration:
    """The samples of an .npz file, in the form of `named_inputs`; without one, those supplied for the model.

    Raises `ConfigError` if the file is wrong, or if there is none and the model has no supplied samples.
    """
    if file is not None:
        with stored_arrays(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
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
