"""The models that DeePar brings, and how a file becomes one."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bus.errors import ConfigError, ModelError, UnknownNameError
from stages.models.files.cache import cache_dir, write_whole
from stages.models.model import KnownFile, Model, model_name, read_model
from stages.models.runtime.litert import SegmentRunner
from stages.zoo.networks import ALEXNET, DEEPFACE, LENET, MOBILENET, NETWORKS, VGG16, build, seeded
from stages.zoo.registry import SHA256, digits, generate, list_models, load_model
from tests.unit.stages import built_models

PAPER_ALEXNET = [
    *("conv_1", "norm_1", "maxpool_1", "conv_2", "norm_2", "maxpool_2"),
    *("conv_3", "conv_4", "conv_5", "maxpool_3", "fc_1", "fc_2", "fc_3"),
]

FLATTEN_BYTES = 8
"""The shape to which the RESHAPE before the first fully-connected layer flattens."""


def test_lenet_recognises_digits_that_its_training_never_saw(lenet: Model) -> None:
    images, labels = digits()
    runner = SegmentRunner(lenet.source)
    right = sum(
        int(runner.run([image[None]])[0].argmax() == label) for image, label in zip(images, labels, strict=True)
    )
    assert len(images) >= 300
    assert right / len(images) > 0.95


@pytest.mark.parametrize("delegate", [True, False])
def test_the_reshape_changes_no_bit_of_lenet_s_results(lenet: Model, delegate: bool) -> None:
    images, _ = digits()
    explicit = SegmentRunner(lenet.source, delegate=delegate)
    implicit = SegmentRunner(built_models.implicit_flatten(bytes(lenet.data)), delegate=delegate)
    for image in images[:50]:
        assert explicit.run([image[None]])[0].tobytes() == implicit.run([image[None]])[0].tobytes()


@pytest.mark.parametrize("name", ["lenet", "alexnet", "mobilenet"])
def test_no_layer_of_the_zoo_flattens_its_input_itself(name: str) -> None:
    graph = load_model(name).graph
    read = [graph.operators[layer.operator].inputs[0] for layer in graph.layers if layer.kind == "FULLY_CONNECTED"]
    assert {len(graph.shape(tensor)) for tensor in read} == {2}


def test_digits_are_pictures_that_nobody_can_change() -> None:
    images, labels = digits()
    assert images.shape[1:] == (28, 28, 1)
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    assert set(labels) == set(range(10))
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_alexnet_has_the_paper_s_layers(alexnet: Model) -> None:
    assert [cut.name for cut in alexnet.manifest.cuts] == ["input", *PAPER_ALEXNET]
    assert alexnet.manifest.cuts[3].tensors[0].shape == (1, 27, 27, 96)
    assert alexnet.manifest.cuts[10].tensors[0].shape == (1, 6, 6, 256)
    assert alexnet.manifest.cuts[0].cut_bytes == 227 * 227 * 3 * 4


@pytest.mark.parametrize(
    ("network", "outputs", "parameters"), [(VGG16, 1000, 138_357_544), (DEEPFACE, 2622, 145_002_878)]
)
def test_vgg_and_deepface_are_the_published_networks(network: object, outputs: int, parameters: int) -> None:
    graph = build(network, seeded(1))  # type: ignore[arg-type]
    assert graph.size_bytes == 4 * parameters + FLATTEN_BYTES
    layers = network.layers  # type: ignore[attr-defined]
    assert layers[-1].outputs == outputs
    assert len(layers) == 21


def test_mobilenet_is_the_published_network_with_half_the_width() -> None:
    graph = build(MOBILENET, seeded(1))
    # Its 1.34 million parameters less those of batch normalisation beside the biases.
    assert graph.size_bytes == 4 * 1_326_120 + FLATTEN_BYTES
    assert len(MOBILENET.layers) == 29


def test_every_position_of_mobilenet_can_be_cut() -> None:
    model = load_model("mobilenet")
    sample = np.random.default_rng(1).random(MOBILENET.input_shape, dtype=np.float32)
    outputs = SegmentRunner(model.source).run([sample])[0]
    assert [cut.tensors[0].shape[1:] for cut in model.manifest.cuts][-3:] == [(4, 4, 512), (1, 1, 512), (1000,)]
    assert all(cut.cuttable for cut in model.manifest.cuts)
    assert 0.05 < outputs.std() < 20


def test_weights_keep_the_activations_sane(alexnet: Model) -> None:
    sample = np.random.default_rng(1).random(ALEXNET.input_shape, dtype=np.float32)
    outputs = SegmentRunner(alexnet.source).run([sample])[0]
    assert np.isfinite(outputs).all()
    assert 0.05 < outputs.std() < 20


def test_the_same_bytes_come_out_of_the_same_seed(alexnet: Model) -> None:
    assert alexnet.sha256 == SHA256["alexnet"] == hashlib.sha256(alexnet.data).hexdigest()
    small = build(LENET, seeded(7))
    assert small.to_bytes() == build(LENET, seeded(7)).to_bytes()
    assert small.to_bytes() != build(LENET, seeded(8)).to_bytes()


def test_listing_generates_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))
    entries = {entry.name: entry for entry in list_models()}
    assert list(entries) == list(NETWORKS)
    assert entries["lenet"].ready
    assert not entries["vgg16"].ready
    assert entries["vgg16"].size_bytes == pytest.approx(553.4e6, rel=0.01)
    assert not list(tmp_path.rglob("*.tflite"))


def test_generating_shows_progress_and_leaves_one_whole_file(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = tmp_path / "net.tflite"
    digest = generate(LENET, path, lambda what, done, total: seen.append((done, total)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.tflite"]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert seen == sorted(seen)
    assert seen[-1][0] == path.stat().st_size


def test_a_damaged_file_in_the_cache_is_generated_anew(
    lenet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = build(LENET, seeded(3)).to_bytes()
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(NETWORKS, "small", replace(LENET, name="small", seed=3))
    monkeypatch.setitem(SHA256, "small", hashlib.sha256(small).hexdigest())
    model = load_model("small")
    assert bytes(model.data) == small
    model.path.chmod(0o600)
    model.path.write_bytes(small[:-1] + b"x")
    assert bytes(load_model("small").data) == small
    assert model.path.read_bytes() == small


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"disk is full.*are needed") as caught:
        write_whole(tmp_path / "x", [b"x"], size_bytes=1 << 60)
    assert "DEEPAR_CACHE_DIR" in str(caught.value.remedy)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stages.models.files.cache.os.fsync", full)
    with pytest.raises(ModelError, match="disk is full"):
        write_whole(tmp_path / "y", [b"y"])
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_made_is_the_caller_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEEPAR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot be created"):
        cache_dir("models")


def test_unknown_names_hint_at_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean alexnet") as caught:
        load_model("alexnett")
    assert "vgg16" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("file", "name"), [("face landmark v2.tflite", "face-landmark-v2"), ("_x_.tflite", "x"), ("ä.tflite", "model")]
)
def test_a_file_s_name_becomes_one_that_messages_carry(file: str, name: str) -> None:
    assert model_name(Path(file)) == name


def test_a_wrong_hash_is_refused(lenet: Model, tmp_path: Path) -> None:
    path = tmp_path / "mine.tflite"
    path.write_bytes(bytes(lenet.data))
    assert load_model(path, sha256=lenet.sha256.upper()).name == "mine"
    with pytest.raises(ModelError, match=r"mine.tflite: has SHA-256 \w+, not 0{64} as asked for"):
        load_model(path, sha256="0" * 64)
    with pytest.raises(ModelError, match="as asked for"):
        load_model("lenet", sha256="0" * 64)


def test_a_large_file_is_used_from_a_copy_that_its_owner_cannot_change(lenet: Model, tmp_path: Path) -> None:
    path = tmp_path / "mine.tflite"
    path.write_bytes(bytes(lenet.data))
    model = read_model(path, KnownFile(trusted=True), in_memory_bytes=1000)
    path.write_bytes(b"something else")
    assert model.sha256 == lenet.sha256
    assert bytes(model.data[:]) == bytes(lenet.data)
    assert SegmentRunner(model.source).input_names == ("input",)
