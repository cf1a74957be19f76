"""`deepar infer` against the real HTTP endpoint on a fake inference: its inputs, what it prints, and its errors."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bus.tensors import Array
from deploy.kafka_local.ports import free_port
from stages.models.files.metadata import ModelMetadata
from stages.serving.values import Fault, InferRequest, ModelInfo, ServingError
from tests.unit.deploy.test_cli import run
from tests.unit.stages.serving.fake_inference import FakeInference, tensor
from tests.unit.stages.serving.http.client import rest_server

X = np.array([[1.5, -2.0, 3.25, 0.5]], np.float32)
TOKEN = "a-token-of-the-tests"


class Typed:
    """`deepar infer` as a user types it in a folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.folder = folder
        monkeypatch.chdir(folder)

    def alone(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr without an endpoint."""
        code = run(self._monkeypatch, "infer", *words)
        printed = self._capsys.readouterr()
        return code, printed.out, printed.err

    async def on(self, fake: FakeInference, *words: str, tokens: tuple[str, ...] = ()) -> tuple[int, str, str]:
        """Exit code, stdout and stderr with an endpoint on `fake`."""
        async with rest_server(fake, tokens=tokens) as server:
            self._monkeypatch.setenv("DEEPAR_URL", f"http://127.0.0.1:{server.port}")
            return await asyncio.to_thread(self.alone, *words)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Typed:
    for name in ("DEEPAR_TOKEN", "DEEPAR_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    return Typed(monkeypatch, capsys, tmp_path)


def sent(fake: FakeInference, name: str = "x") -> Array:
    """The input of the only request."""
    (request,) = fake.requests
    return request.inputs[name]


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [X, X[0], X.astype(np.float64), np.vstack([X] * 30)])
async def test_an_array_of_any_float_type_and_number_of_samples(typed: Typed, array: Array) -> None:
    fake = FakeInference()
    np.save(typed.folder / "own.npy", array)
    code, out, err = await typed.on(fake, "double", "--input", "own.npy")
    assert (code, err) == (0, "")
    assert sent(fake).dtype == np.float32
    assert np.array_equal(sent(fake), np.atleast_2d(array))
    assert out.splitlines()[0].strip() == "y"
    assert "computed on device" in out
    assert ("10 more samples" in out) == (len(sent(fake)) == 30)


async def test_arrays_by_name_from_one_file_and_from_several(typed: Typed) -> None:
    inputs = (tensor("xa", (1, 4)), tensor("xb", (1, 2), "int32"))
    numbers = np.array([[1, 2]], np.int32)
    np.savez(typed.folder / "both.npz", xa=X, xb=numbers)
    np.save(typed.folder / "a.npy", X)
    np.save(typed.folder / "b.npy", numbers)
    for words in (("--input", "both.npz"), ("--input", "xb=b.npy", "--input", "xa=a.npy")):
        fake = FakeInference(inputs)
        assert (await typed.on(fake, "double", *words))[0] == 0
        assert np.array_equal(sent(fake, "xa"), X)
        assert np.array_equal(sent(fake, "xb"), numbers)
    code, _, err = await typed.on(FakeInference(inputs), "double", "--input", "a.npy")
    assert code == 2
    assert "double has the inputs xa, xb; write NAME=FILE for each" in err


async def test_the_only_array_of_a_file_may_have_any_name(typed: Typed) -> None:
    fake = FakeInference()
    np.savez(typed.folder / "one.npz", X)
    assert (await typed.on(fake, "double", "--input", "one.npz"))[0] == 0
    assert np.array_equal(sent(fake), X)


def picture(folder: Path) -> Array:
    """Saves an image of 2 x 3 pixels, and returns them."""
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
    Image.fromarray(pixels).save(folder / "photo.png")
    return pixels


def image_model(dtype: str, metadata: ModelMetadata | None = None) -> FakeInference:
    """A classifier of two classes for images of 2 x 3 pixels."""

    def compute(request: InferRequest) -> Sequence[Array]:
        return [np.array([[0.25, 0.75]], np.float32)]

    info = ModelInfo(
        name="double",
        version="1",
        sha256="0" * 64,
        inputs=(tensor("x", (1, 2, 3, 3), dtype),),
        outputs=(tensor("y", (1, 2)),),
        metadata=metadata,
    )
    return FakeInference((), (tensor("y", (1, 2)),), compute, info=info)


async def test_an_image_becomes_numbers_as_the_options_or_the_model_say(typed: Typed) -> None:
    pixels = picture(typed.folder).astype(np.float64)
    told = ModelMetadata((100.0,), (50.0,), ("cat", "dog"))
    cases: list[tuple[FakeInference, tuple[str, ...], Array]] = [
        (image_model("float32"), (), (pixels / 255.0).astype(np.float32)),
        (image_model("float32", told), (), ((pixels - 100.0) / 50.0).astype(np.float32)),
        (image_model("float32", told), ("--mean", "0", "--std", "2"), (pixels / 2.0).astype(np.float32)),
        (image_model("uint8"), (), pixels.astype(np.uint8)),
        (image_model("int8"), (), (pixels - 128).astype(np.int8)),
    ]
    for fake, words, expected in cases:
        code, out, err = await typed.on(fake, "double", "--input", "photo.png", *words)
        assert (code, err) == (0, "")
        assert np.array_equal(sent(fake), expected[np.newaxis])
        assert ("dog" in out) == (fake.models()[0].metadata is not None)


@pytest.mark.parametrize("kind", ["npy", "png"])
async def test_the_standard_input(typed: Typed, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    fake = FakeInference() if kind == "npy" else image_model("uint8")
    pixels = picture(typed.folder)
    np.save(typed.folder / "photo.npy", X)
    data = io.BytesIO((typed.folder / f"photo.{kind}").read_bytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=data))
    assert (await typed.on(fake, "double", "--input", "-"))[0] == 0
    assert np.array_equal(sent(fake), X if kind == "npy" else pixels[np.newaxis])


# --- what it prints --------------------------------------------------------------------------------------------------


async def test_json_and_the_file_of_the_outputs(typed: Typed) -> None:
    np.save(typed.folder / "own.npy", X)
    fake = FakeInference()
    words = ("--input", "own.npy", "--json", "--output", "out.npz", "--placement", "device+cloud", "--priority", "2")
    code, out, _ = await typed.on(fake, "double", *words, "--min-agreement", "0.995")
    assert code == 0
    printed = json.loads(out)
    assert printed["outputs"] == [{"name": "y", "dtype": "float32", "shape": [1, 4], "data": (X + X)[0].tolist()}]
    assert (printed["model"], printed["placement"]["kind"], printed["placement"]["attempt"]) == ("double", "device", 1)
    with np.load(typed.folder / "out.npz") as kept:
        assert kept["y"].tobytes() == (X + X).tobytes()
    terms = fake.requests[0].terms
    assert (terms.tiers, terms.priority, terms.timeout_s) == (("device", "cloud"), 2, 60.0)
    assert terms.min_agreement == 0.995


def zipped(name: str, content: bytes) -> bytes:
    """A zip archive with one file."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return data.getvalue()


def damaged(at: int) -> bytes:
    """A compressed `.npz` file with a hundred wrong bytes."""
    data = io.BytesIO()
    np.savez_compressed(data, x=np.arange(4096.0))
    whole = bytearray(data.getvalue())
    whole[at : at + 100] = bytes(100)
    return bytes(whole)


NPY = b"\x93NUMPY\x01\x00\x45\x00{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}\n"
"""A `.npy` file without numbers, for the length that its header claims."""


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("nothing.npy", None, "--input nothing.npy: No such file or directory"),
        ("empty.npy", b"", "--input empty.npy: it is empty"),
        ("text.txt", b"hello", "--input text.txt: neither a numpy file (.npy, .npz) nor an image"),
        ("cut.npy", b"\x93NUMPY\x01\x00", "--input cut.npy: not a readable numpy file"),
        ("cut.npz", b"PK\x03\x04cut", "--input cut.npz: not a readable numpy file"),
        (
            "other.zip",
            zipped("notes.txt", b"hello"),
            "--input other.zip: not a readable numpy file: it has other files",
        ),
        ("huge.npy", NPY % b"99999999999999", "--input huge.npy: not a readable numpy file"),
        ("packing.npz", damaged(60), "--input packing.npz: not a readable numpy file"),
        ("header.npz", damaged(200), "--input header.npz: not a readable numpy file"),
        ("sum.npz", damaged(1000), "--input sum.npz: not a readable numpy file"),
        ("wrong.npy", np.zeros((3, 5), np.float32), "input x of double has shape 3x5, expected Nx4"),
        ("whole.npy", np.zeros((1, 4), np.int64), "input x of double has dtype int64, expected float32"),
        ("code.npy", np.array([{}], dtype=object), "--input code.npy: not a readable numpy file"),
    ],
)
async def test_a_wrong_input_is_named_and_not_sent(
    typed: Typed, file: str, content: bytes | Array | None, said: str
) -> None:
    if isinstance(content, bytes):
        (typed.folder / file).write_bytes(content)
    elif content is not None:
        np.save(typed.folder / file, content)
    fake = FakeInference((tensor("x", (1, 2, 2, 3)),)) if file == "text.txt" else FakeInference()
    code, out, err = await typed.on(fake, "double", "--input", file)
    assert (code, out) == (2, "")
    assert said in err
    assert not fake.requests


async def test_an_image_for_a_model_that_takes_none(typed: Typed) -> None:
    picture(typed.folder)
    code, _, err = await typed.on(FakeInference(), "double", "--input", "photo.png")
    assert code == 2
    assert "input x has the shape -1x4, which no image has; pass a .npy file" in err


async def test_what_the_endpoint_refuses(typed: Typed) -> None:
    np.save(typed.folder / "own.npy", X)
    code, _, err = await typed.on(FakeInference(), "triple", "--input", "own.npy")
    assert code == 1
    assert "there is no model 'triple'" in err
    busy = FakeInference()
    busy.fault = ServingError(Fault.BUSY, "the queue is full", retry_after_s=1.0)
    code, _, err = await typed.on(busy, "double", "--input", "own.npy")
    assert code == 1
    assert err.count("the queue is full; the request may be repeated") == 1
    late = FakeInference()
    late.gate = asyncio.Event()
    code, _, err = await typed.on(late, "double", "--input", "own.npy", "--timeout", "50ms")
    assert code == 1
    assert "did not answer within 0.05 s" in err


async def test_the_token_comes_from_a_file_or_the_environment(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(typed.folder / "own.npy", X)
    (typed.folder / "token").write_text(TOKEN + "\n", encoding="utf-8")
    words = ("double", "--input", "own.npy")
    code, _, err = await typed.on(FakeInference(), *words, tokens=(TOKEN,))
    assert code == 2
    assert "pass --token-file, or set DEEPAR_TOKEN" in err
    assert (await typed.on(FakeInference(), *words, "--token-file", "token", tokens=(TOKEN,)))[0] == 0
    monkeypatch.setenv("DEEPAR_TOKEN", TOKEN)
    assert (await typed.on(FakeInference(), *words, tokens=(TOKEN,)))[0] == 0


def test_without_an_endpoint_it_says_how_to_start_one(typed: Typed) -> None:
    np.save(typed.folder / "own.npy", X)
    address = f"127.0.0.1:{free_port()}"
    code, _, err = typed.alone("double", "--input", "own.npy", "--url", address)
    assert code == 2
    assert f"no answer from http://{address}: Connection refused" in err
    assert "deepar up deploy/serve.toml" in err
