"""The zoo: the models supplied with DeePar, their files, and the generation of seeded ones.

LeNet is a file of the package; the other networks are generated into the cache on first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from bus.errors import ModelError, unknown_name
from bus.tensors import Array
from stages.models.files.cache import Progress, cache_dir, locked, write_whole
from stages.models.files.choice import ModelChoice
from stages.models.model import KnownFile, Model, read_model
from stages.zoo.networks import LENET, NETWORKS, Network, build, seeded

SHA256 = {
    "lenet": "5fd05d309177499a3f8261999c56bf696305d92713b9237dd7d20baae98e6b9c",
    "alexnet": "622772374bf65e0e788e1d4f3d33117d78ff97eba53eccaddaf4f5573d687e3d",
    "vgg16": "8cc8ca06d5059fd0f0fcf63e15106b63c0e01b779e97f98273ed67b89174cede",
    "deepface": "5e0c6334e65cfa2138a667921c48051d0b426f76dcf9dd4354094253bd6f5dca",
    "mobilenet": "4c9147a37fc5a487c19ca52025d256e1ca71df700609443a240671c699c2a455",
}
"""Expected hashes of the files, so that every node uses the same weights."""


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo, as `deepar models list` prints it."""

    name: str  # as users write it
    title: str  # display name
    layers: int  # l
    size_bytes: int  # of the file; accurate to a few kilobytes before it is generated
    sha256: str  # expected hash of the file
    path: Path  # of the file, also before it is generated
    ready: bool  # whether the file exists


def _path(network: Network) -> Path:
    if network is LENET:
        return Path(str(resources.files("stages").joinpath("data", "lenet.tflite")))
    return cache_dir("models") / f"{network.name}-{SHA256[network.name][:12]}.tflite"


def list_models() -> list[ZooEntry]:
    """The entries of the zoo in the paper's order, without generating files."""
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
    choice: ModelChoice | None = None,
) -> Model:
    """Reads, hashes and validates a model: a zoo model by name, or any `.tflite` file by path.

    A seeded model is generated into the cache on first use, with calls of `progress(what, done_bytes, total_bytes)`.
    `sha256`, if given, must equal the file's hash; `choice` selects a signature and input shapes. Raises `UnknownNameError`
    for an unknown name and `ModelError` for an invalid file.
    """
    name = str(name_or_path)
    network = NETWORKS.get(name)
    if network is None:
        path = Path(name_or_path)
        if not path.exists() and path.suffix != ".tflite" and len(path.parts) == 1:
            raise unknown_name("model", name, NETWORKS, remedy=f"name one of {', '.join(NETWORKS)}, or a .tflite file")
        return read_model(path, KnownFile(sha256=sha256), progress=progress, choice=choice)

    path, known = _path(network), KnownFile(name=network.name, sha256=SHA256[network.name], trusted=True)
    if path.is_file():
        try:
            model = read_model(path, known, progress=progress, choice=choice)
        except ModelError:
            if network is LENET:
                raise
        else:
            return _checked(model, sha256)
    with locked(path):
        if not path.is_file() or _hash_differs(path, known):
            generate(network, path, progress)
    return _checked(read_model(path, known, choice=choice), sha256)


def generate(network: Network, path: Path, progress: Progress | None = None) -> str:
    """Writes the network's file with weights from its seed and returns the SHA-256."""
    graph = build(network, seeded(network.seed))
    digest = write_whole(path, graph.chunks(), size_bytes=graph.size_bytes, progress=progress)
    path.chmod(0o400)  # read-only, because processes map the file while they use it
    return digest


def _hash_differs(path: Path, known: KnownFile) -> bool:
    try:
        read_model(path, known)
    except ModelError:
        return True
    return False


def _checked(model: Model, sha256: str | None) -> Model:
    if sha256 is not None and sha256.lower() != model.file_sha256:
        raise ModelError(str(model.path), f"has SHA-256 {model.file_sha256}, not {sha256.lower()} as asked for")
    return model


@cache
def digits() -> tuple[Array, Array]:
    """The test digits: images (n, 28, 28, 1) of float32 in 0..1, and labels (n,) of int64; both read-only.

    They are 500 pictures of the UCI "Optical Recognition of Handwritten Digits", held out from the training of LeNet.
    """
    with resources.as_file(resources.files("stages").joinpath("data", "digits.npz")) as path, np.load(path) as stored:
        images = stored["images"].astype(np.float32) / np.float32(255)
        labels = stored["labels"].astype(np.int64)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels
