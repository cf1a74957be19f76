"""The models that DeePar brings: where they are, and how they come to be there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bus.errors import ModelError, unknown_name
from stages.models.files.cache import Progress, cache_dir, locked, write_whole
from stages.models.files.choice import Choice
from stages.models.model import Model, read_model
from stages.zoo.networks import LENET, NETWORKS, Network, build, seeded

Array: TypeAlias = np.ndarray[Any, Any]

SHA256 = {
    "lenet": "c48d45171dc677eda6dc8ff6e4ebfd09929bfb9b26c5d6ef03b1d7f4b52f30f5",
    "alexnet": "d6aab4343d1da49c46b94f01f3c4b7b010f37b65f331987c0997abf2335e2cd2",
    "vgg16": "fd11c7464caceb78682d2a7128d8e54cfe0a0231f1f8539739fcbacedc709dec",
    "deepface": "a3f82562df0656967323d942c9d83250c08916eece7a688d62113a807702d3d6",
}
"""What the files must hash to: every node then speaks of the same weights."""


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo, as `deepar models list` prints it."""

    name: str  # as users write it
    title: str  # as people read it
    layers: int  # l
    size_bytes: int  # of the file, within a few kilobytes where it is not generated yet
    sha256: str  # what the file hashes to
    path: Path  # where it is or will be
    ready: bool  # whether the file is there


def _path(network: Network) -> Path:
    if network is LENET:
        return Path(str(resources.files("stages").joinpath("data", "lenet.tflite")))
    return cache_dir("models") / f"{network.name}-{SHA256[network.name][:12]}.tflite"


def list_models() -> list[ZooEntry]:
    """The zoo, in the order of the paper's networks. Nothing is generated."""
    entries = []
    for network in NETWORKS.values():
        path = _path(network)
        ready = path.is_file()
        size_bytes = path.stat().st_size if ready else build(network, seeded(network.seed)).size_bytes
        layers = len(network.layers)
        entries.append(ZooEntry(network.name, network.title, layers, size_bytes, SHA256[network.name], path, ready))
    return entries


def load_model(
    name_or_path: str | Path,
    progress: Progress | None = None,
    *,
    sha256: str | None = None,
    choice: Choice | None = None,
) -> Model:
    """A model of the zoo by its name, or any `.tflite` file by its path; read, hashed, validated.

    Weights from a seed are generated at the first use, into the cache, with `progress(what, done_bytes, total_bytes)`.
    `sha256`, where given, must be the file's; `choice` says which signature and which shapes are meant. Raises
    `UnknownNameError` for a name that is neither, `ModelError` for a file that is refused.
    """
    name = str(name_or_path)
    network = NETWORKS.get(name)
    if network is None:
        path = Path(name_or_path)
        if not path.exists() and path.suffix != ".tflite" and len(path.parts) == 1:
            raise unknown_name("model", name, NETWORKS, remedy=f"name one of {', '.join(NETWORKS)}, or a .tflite file")
        return read_model(path, sha256=sha256, progress=progress, choice=choice)

    path, expected = _path(network), SHA256[network.name]
    if path.is_file():
        try:
            model = read_model(path, name=network.name, sha256=expected, progress=progress, trusted=True, choice=choice)
        except ModelError:
            if network is LENET:
                raise
        else:
            return _checked(model, sha256)
    with locked(path):
        if not path.is_file() or _hash_differs(path, expected):
            generate(network, path, progress)
    return _checked(read_model(path, name=network.name, sha256=expected, trusted=True, choice=choice), sha256)


def generate(network: Network, path: Path, progress: Progress | None = None) -> str:
    """Writes the network with weights from its seed; the file's SHA-256."""
    graph = build(network, seeded(network.seed))
    digest = write_whole(path, graph.chunks(), size_bytes=graph.size_bytes, progress=progress)
    path.chmod(0o400)  # it is mapped while it is used, and must not change under anyone's hands
    return digest


def _hash_differs(path: Path, expected: str) -> bool:
    try:
        read_model(path, sha256=expected, trusted=True)
    except ModelError:
        return True
    return False


def _checked(model: Model, sha256: str | None) -> Model:
    if sha256 is not None and sha256.lower() != model.file_sha256:
        raise ModelError(str(model.path), f"has SHA-256 {model.file_sha256}, not {sha256.lower()} as asked for")
    return model


@cache
def digits() -> tuple[Array, Array]:
    """The test digits: images (n, 28, 28, 1) of float32 in 0..1, and labels (n,) of int64; neither can be written.

    They are 500 pictures of the UCI "Optical Recognition of Handwritten Digits" that LeNet's training never saw.
    """
    with resources.as_file(resources.files("stages").joinpath("data", "digits.npz")) as path, np.load(path) as stored:
        images = stored["images"].astype(np.float32) / np.float32(255)
        labels = stored["labels"].astype(np.int64)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels
