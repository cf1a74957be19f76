"""Codecs measured on LeNet and on small models, compared with running the layers directly."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bus.codecs.coding import decode, encode
from bus.errors import ConfigError
from bus.tensors import Array, TensorHead
from bus.values import Codec
from stages.calibration import measurement
from stages.calibration.measurement import MeasuredCodecs, measure_codecs
from stages.calibration.samples import Calibration, calibration_of, has_classes, lowest_proven
from stages.models.model import Model
from stages.models.runtime.litert import SegmentRunner
from stages.models.slicer import slice_model
from stages.models.verify import random_inputs, run_part
from stages.zoo.registry import digits, load_model
from tests.unit.stages import built_models

DIGITS = 12


@pytest.fixture(scope="module")
def few(lenet: Model) -> Calibration:
    """A few digits."""
    return Calibration([[image[None]] for image in digits()[0][:DIGITS]], classes=True)


@pytest.fixture(scope="module")
def found(lenet: Model, few: Calibration) -> MeasuredCodecs:
    """LeNet's codecs on them."""
    return measure_codecs(lenet, few)


def outputs(model: Model, sample: list[Array], crossings: dict[int, Codec]) -> tuple[list[Array], list[int]]:
    """The model's outputs where activations cross positions with codecs, and the encoded sizes there."""
    values, sizes = list(sample), []
    for begin, end in pairwise(sorted({0, *crossings, model.graph.depth})):
        if (codec := crossings.get(begin)) is not None:
            specs = model.manifest.cuts[begin].tensors
            payload = encode(codec, values, specs)
            sizes.append(len(payload))
            values = decode(codec, [TensorHead(spec.dtype, spec.shape) for spec in specs], payload, 1 << 30)
        part = slice_model(model, begin + 1, end)
        values = run_part(part, SegmentRunner(part.to_bytes()), values)
    return values, sizes


def agreement(model: Model, few: Calibration, crossings: dict[int, Codec]) -> float:
    same = [
        int(outputs(model, list(sample), crossings)[0][0].argmax())
        == int(outputs(model, list(sample), {})[0][0].argmax())
        for sample in few.samples
    ]
    return sum(same) / len(same)


def test_every_codec_is_measured_at_every_cut(lenet: Model, few: Calibration, found: MeasuredCodecs) -> None:
    assert {one.position for one in found.codecs} == set(range(lenet.graph.depth))
    assert (found.samples, found.classes, found.calibration_file) == (DIGITS, True, None)
    for one in found.codecs:
        assert one.encode_s > 0
        assert one.decode_s > 0
        assert (one.agreement is None) == one.codec.lossless
    for one in (found.codecs[0], found.codecs[4], found.codecs[-1]):
        sizes = [outputs(lenet, list(sample), {one.position: one.codec})[1][0] for sample in few.samples]
        assert one.bytes == round(statistics.fmean(sizes))


def test_agreements_are_those_of_running_the_layers(lenet: Model, few: Calibration, found: MeasuredCodecs) -> None:
    singles = {(one.position, one.codec): one.agreement for one in found.codecs}
    for position, codec in ((1, Codec.Q4), (4, Codec.Q8)):
        assert singles[position, codec] == pytest.approx(agreement(lenet, few, {position: codec}), abs=1e-6)
    paired = {(one.position1, one.codec1, one.position2, one.codec2): one.agreement for one in found.agreements}
    lossy = [one for one in found.codecs if not one.codec.lossless]
    assert len(paired) == sum(one.position < two.position for one in lossy for two in lossy)
    for pair in ((0, Codec.Q4, 3, Codec.Q4), (2, Codec.Q8, 5, Codec.Q4)):
        crossings = {pair[0]: pair[1], pair[2]: pair[3]}
        assert paired[pair] == pytest.approx(agreement(lenet, few, crossings), abs=1e-6)


def test_errors_of_two_crossings_compound(tmp_path: Path) -> None:
    path = tmp_path / "branches.tflite"
    path.write_bytes(built_models.residual().to_bytes())
    model = load_model(path)
    samples = [random_inputs(model, np.random.default_rng(seed)) for seed in range(6)]
    found = measure_codecs(model, Calibration(samples, classes=False))
    assert not found.classes
    singles = {(one.position, one.codec): one.agreement or 0.0 for one in found.codecs}
    pairs = [one for one in found.agreements if (one.codec1, one.codec2) == (Codec.Q8, Codec.Q8)]
    assert pairs
    assert all(
        one.agreement < min(singles[one.position1, one.codec1], singles[one.position2, one.codec2]) for one in pairs
    )


def test_positions_that_cannot_be_cut_are_left_out_and_state_does_not_leak(tmp_path: Path) -> None:
    path = tmp_path / "stateful.tflite"
    path.write_bytes(built_models.stateful().to_bytes())
    model = load_model(path)
    sample = random_inputs(model, np.random.default_rng(1))
    found = measure_codecs(model, Calibration([sample] * 3, classes=False))
    assert not {one.position for one in found.codecs} & set(model.graph.blocked)
    assert all(one.agreement > 0.9 for one in found.codecs if one.agreement is not None)


def test_memory_limits_the_samples(lenet: Model, few: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max(cut.cut_bytes for cut in lenet.manifest.cuts)
    monkeypatch.setattr(measurement, "MAX_HELD_BYTES", 3 * largest + 1)
    assert measure_codecs(lenet, few, pairs=False).samples == 3


def test_lenet_has_samples_of_its_own_and_they_are_classes(lenet: Model) -> None:
    supplied = calibration_of(lenet, None)
    assert (len(supplied.samples), supplied.classes, supplied.file) == (500, True, None)
    assert not has_classes(lenet)  # it ends without a softmax


def test_a_calibration_file_has_the_inputs_of_the_model(lenet: Model, tmp_path: Path) -> None:
    images = digits()[0][:5]
    np.savez(tmp_path / "a.npz", images)
    assert not calibration_of(lenet, tmp_path / "a.npz").classes
    np.savez(tmp_path / "b.npz", images=images, labels=np.zeros(5, np.int64))
    labelled = calibration_of(lenet, tmp_path / "b.npz")
    assert (len(labelled.samples), labelled.classes, labelled.file) == (5, True, tmp_path / "b.npz")
    assert labelled.samples[0][0].shape == (1, 28, 28, 1)


def test_a_wrong_calibration_file_is_refused(lenet: Model, alexnet: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no calibration samples"):
        calibration_of(alexnet, None)
    with pytest.raises(ConfigError, match=r"gone\.npz cannot be read"):
        calibration_of(lenet, tmp_path / "gone.npz")
    np.savez(tmp_path / "shape.npz", np.zeros((2, 9, 9, 1), np.float32))
    with pytest.raises(ConfigError, match="the model takes float32"):
        calibration_of(lenet, tmp_path / "shape.npz")
    np.savez(tmp_path / "empty.npz", np.zeros((0, 28, 28, 1), np.float32))
    with pytest.raises(ConfigError, match="no samples"):
        calibration_of(lenet, tmp_path / "empty.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="arrays by name"):
        calibration_of(lenet, tmp_path / "one.npy")


def test_what_agreement_on_all_samples_proves() -> None:
    assert lowest_proven(500) == pytest.approx(0.994)
    assert lowest_proven(2) == 0.0
