"""`deepar infer`: send an input of one's own to an endpoint, and show the answer."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bus.errors import ConfigError, DeeparError
from bus.tensors import Array
from bus.text.json_text import json_text
from bus.text.units import format_count, format_seconds, parse_duration
from bus.values import DELAY_PARTS
from deepar.client import DEFAULT_URL, Client
from deepar.protocol import Answer, InferenceError, InputError, ModelInfo
from deploy.console_output.input_files import Normalization, image_array, read_input
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import AsJson
from deploy.console_output.writable import writable_file

TOP = 5
"""Number of classes that are shown."""
MOST_CLASSES = 100_000
MOST_SAMPLES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Where the endpoint is, and who asks."""

    url: Annotated[str, typer.Option(envvar="DEEPAR_URL", help="Endpoint of a device or a gateway.")] = DEFAULT_URL
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="DEEPAR_TOKEN_FILE", help="File with the endpoint's token. DEEPAR_TOKEN holds the token itself."
        ),
    ] = None
    timeout: Annotated[str, typer.Option(help="Give up after this time; the endpoint does so, too.")] = "60s"

    def client(self) -> Client:
        """A client of the endpoint. Raises `ConfigError`."""
        token = os.environ.get("DEEPAR_TOKEN")
        if self.token_file is not None:
            try:
                token = self.token_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--token-file {self.token_file}: {error}") from None
        return Client(self.url, token=token, timeout_s=parse_duration(self.timeout, "--timeout"))


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How pixels become numbers: (pixel - mean) / std. By default as the model's metadata says, else from 0 to 1."""

    mean: Annotated[list[float] | None, typer.Option(help="Subtracted from each pixel; once, or once per channel.")] = (
        None
    )
    std: Annotated[
        list[float] | None, typer.Option(help="Divides each pixel after that; once, or once per channel.")
    ] = None

    def normalization(self, model: ModelInfo) -> Normalization:
        """From the options, else from the model's metadata, else 0 to 1."""
        told = Normalization()
        mean = tuple(self.mean or _floats(model.parameters.get("mean")) or told.mean)
        std = tuple(self.std or _floats(model.parameters.get("std")) or told.std)
        if not all(std):
            raise ConfigError("--std: must not be 0")
        return Normalization(mean, std)


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where the request may be computed."""

    placement: Annotated[
        str | None,
        typer.Option(metavar="TIERS", help="Tiers that may compute, like device+edge, or tiers that may not: -cloud."),
    ] = None
    priority: Annotated[int | None, typer.Option(min=1, help="1 is the most urgent.")] = None

    def parameters(self) -> dict[str, Any]:
        """As parameters of the request."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is done with the answer."""

    out: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.npz", help="Write the whole outputs to this file.")
    ] = None
    as_json: AsJson = False


@with_option_groups
def infer(
    model: Annotated[str, typer.Argument(help="Name of a served model.")],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="[NAME=]FILE",
            help="A numpy file (.npy, .npz), an image, or - for standard input; repeatable, by name, for several inputs.",
        ),
    ],
    *,
    endpoint: EndpointOptions,
    image: ImageOptions,
    place: PlaceOptions,
    output: OutputOptions,
) -> None:
    """Compute a model on an input of your own, through the endpoint of a device or a gateway.

    The first dimension of an array counts the samples; an array without it, or an image, is one sample. The answer shows the
    most likely classes, or the shape of each output, and where it was computed.

    Example: `deepar infer lenet --input digit.png`
    """
    if output.out is not None:
        writable_file("--output", output.out)
    with endpoint.client() as client:
        try:
            info = client.model(model)
            given = _gathered(info, inputs, image.normalization(info))
            begin_s = time.perf_counter()
            answer = client.infer(model, given, **place.parameters())
            delay_s = time.perf_counter() - begin_s
        except InputError as error:
            raise ConfigError(f"--input: {error}") from None
        except InferenceError as error:
            raise _explained(error, endpoint.url) from None
    if output.out is not None:
        arrays: dict[str, Any] = dict(answer.outputs)
        np.savez(output.out, **arrays)
    if output.as_json:
        print(json_text(_as_json(answer, delay_s)))
    else:
        _show(answer, info, delay_s, output.out)


def _explained(error: InferenceError, url: str) -> DeeparError:
    if error.status == 0 and error.repeatable:
        return ConfigError(
            str(error), remedy="start a device with an endpoint: deepar stage device --serve 127.0.0.1:8600"
        )
    if error.status == 401:
        return ConfigError(f"{url}: {error}", remedy="pass --token-file, or set DEEPAR_TOKEN")
    return DeeparError(f"{url}: {error}" + (" (the request may be sent again)" if error.repeatable else ""))


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values] if isinstance(values, list) else []


def _gathered(model: ModelInfo, words: Sequence[str], normalization: Normalization) -> dict[str, Any]:
    """The inputs by name. Raises `ConfigError`."""
    names = [one.name for one in model.inputs]
    found: dict[str, Any] = {}
    for word in words:
        name, _, file = word.partition("=")
        if name not in names:
            if len(names) > 1 and (file or not word.endswith(".npz")):
                raise ConfigError(
                    f"--input {word}: {model.name} has the inputs {', '.join(names)}; write NAME=FILE for each"
                )
            name, file = names[0], word
        content = read_input(file)
        if isinstance(content, dict):
            found |= content if set(content) & set(names) or len(content) != 1 else {name: next(iter(content.values()))}
        elif isinstance(content, bytes):
            found[name] = image_array(file, content, model.inputs[names.index(name)], normalization)
        else:
            found[name] = content
    return found


# --- the answer ------------------------------------------------------------------------------------------------------


def _parts(parameters: Mapping[str, Any], word: str) -> dict[str, float]:
    """The parts of the delay that an answer names with this word: `predicted` or `measured`."""
    return {f"{part}_s": float(parameters.get(f"deepar_{word}_{part}_s", 0.0)) for part in DELAY_PARTS}


def _as_json(answer: Answer, delay_s: float) -> dict[str, Any]:
    told = answer.parameters
    return {
        "model": answer.model,
        "request_id": answer.id,
        "outputs": [
            {"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "data": array.ravel().tolist()}
            for name, array in answer.outputs.items()
        ],
        "placement": {
            "kind": told.get("deepar_kind"),
            "edge": told.get("deepar_edge") or None,
            "cuts": [int(cut) for cut in str(told.get("deepar_cuts", "")).split(",") if cut],
            "attempt": told.get("deepar_attempt"),
        },
        "predicted": _parts(told, "predicted"),
        "measured": _parts(told, "measured"),
        "delay_s": delay_s,
    }


def _show(answer: Answer, model: ModelInfo, delay_s: float, out: Path | None) -> None:
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    labels = model.parameters.get("labels")
    for name, array in answer.outputs.items():
        rows = array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)
        if array.ndim == 2 and 1 < rows.shape[1] <= MOST_CLASSES and array.dtype.kind != "b":
            console.print(_classes(name, rows, labels if isinstance(labels, list) else None))
            if len(rows) > MOST_SAMPLES_SHOWN:
                console.print(f"{format_count(len(rows) - MOST_SAMPLES_SHOWN, 'more sample')}; --output keeps them all")
        else:
            words = "x".join(map(str, array.shape))
            console.print(f"{name}: {words} {array.dtype}, from {array.min()} to {array.max()}", markup=False)
    console.print(_where(answer, delay_s), markup=False)
    if out is not None:
        console.print(f"  {out}", style="cyan", markup=False)


def _classes(name: str, rows: Array, labels: Sequence[str] | None) -> Table:
    """The most likely classes of each sample."""
    table = Table(title=name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("sample", justify="right")
    table.add_column("class")
    table.add_column("value", justify="right")
    for sample, row in enumerate(rows[:MOST_SAMPLES_SHOWN]):
        best = np.argsort(row, kind="stable")[::-1][: TOP if len(rows) == 1 else 1]
        for index in best:
            label = labels[index] if labels and index < len(labels) else str(index)
            table.add_row(str(sample), label, f"{row[index]:.4g}")
    return table


def _where(answer: Answer, delay_s: float) -> str:
    told = answer.parameters
    kind = told.get("deepar_kind")
    if not kind:
        return f"{format_seconds(delay_s)} to the answer"
    through = f" through {told['deepar_edge']}" if told.get("deepar_edge") else ""
    predicted = told.get("deepar_predicted_s")
    expected = f", predicted {format_seconds(float(predicted))}" if predicted is not None else ""
    return f"computed on {kind}{through}; {format_seconds(delay_s)} to the answer{expected}"
