"""How far a model's outputs agree with those that it has without lossy codecs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bus.tensors import Array
from bus.values import TensorSpec


class ReferenceOutputs:
    """The outputs of all calibration samples, computed on unchanged activations."""

    def __init__(self, outputs: Sequence[Sequence[Array]], specs: Sequence[TensorSpec], *, classes: bool) -> None:
        """`outputs`: the tensors of each sample, described by `specs`."""
        self._specs = specs
        self.classes = classes and any(_has_classes(spec) for spec in specs)
        self._outputs = outputs
        self._best = [self._best_classes(one) for one in outputs] if self.classes else []
        self._sizes = [np.zeros(len(specs)) if self.classes else self._squares(one) for one in outputs]

    def agreement(self, outputs: Sequence[Sequence[Array]]) -> float:
        """The agreement of the outputs of the same samples.

        With classes: the share of them whose best class is the same. Without: 1 minus the relative error (root of the mean
        square) of the output tensor that differs most, at least 0.
        """
        if self.classes:
            same = [
                float(np.mean(self._best_classes(one) == best)) for one, best in zip(outputs, self._best, strict=True)
            ]
            return sum(same) / len(same)
        errors = sum(self._differences(one, right) for one, right in zip(outputs, self._outputs, strict=True))
        sizes = sum(self._sizes)
        with np.errstate(all="ignore"):  # an output of zeros, or one with NaN
            relative = np.where(errors != 0, np.sqrt(errors / sizes), 0.0)
        worst = float(np.nanmax(np.where(np.isfinite(relative), relative, 1.0), initial=0.0))
        return max(0.0, 1.0 - worst)

    def _best_classes(self, outputs: Sequence[Array]) -> Array:
        """The best class of the first output that has classes."""
        first = next(value for value, spec in zip(outputs, self._specs, strict=True) if _has_classes(spec))
        return np.asarray(np.argmax(first, axis=-1))

    def _squares(self, outputs: Sequence[Array]) -> Array:
        return np.array([np.sum(_real(one, spec) ** 2) for one, spec in zip(outputs, self._specs, strict=True)])

    def _differences(self, outputs: Sequence[Array], right: Sequence[Array]) -> Array:
        """The sum of squared differences of each output tensor."""
        pairs = zip(outputs, right, self._specs, strict=True)
        return np.array([np.sum((_real(one, spec) - _real(other, spec)) ** 2) for one, other, spec in pairs])


def _has_classes(spec: TensorSpec) -> bool:
    return bool(spec.shape) and spec.shape[-1] > 1


def _real(values: Array, spec: TensorSpec) -> Array:
    """Values as float64; those of a quantised tensor without their zero point, since its scale cancels out."""
    zero = spec.zero_points[0] if len(spec.zero_points) == 1 else 0
    return np.abs(values).astype(np.float64) if values.dtype.kind == "c" else values.astype(np.float64) - zero
