"""A request of `deepar infer`: its inputs from files, and its answer on the terminal or as JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bus.errors import ConfigError, DeeparError
from bus.tensors import Array
from bus.text.json_text import json_text
from bus.text.units import format_count, format_seconds
from bus.values import DELAY_PARTS
from deepar.client import Client
from deepar.protocol import Answer, InferenceError, InputError, ModelInfo
from deploy.console_output.input_files import Normalization, image_array, read_input

TOP = 5
"""Number of classes that are shown."""
MOST_CLASSES = 100_000
MOST_SAMPLES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Question:
    """What `deepar infer` asks an endpoint."""

    url: str
    token: str | None
    timeout_s: float
    model: str
    inputs: Sequence[str]  # files, or NAME=FILE
    mean: Sequence[float] = ()  # subtracted from each pixel of an image; empty: as the model says
    std: Sequence[float] = ()  # divides each pixel after that
    parameters: Mapping[str, Any]  # of the request


def ask(question: Question, out: Path | None, *, as_json: bool) -> None:
    """Send the request and print its answer; write the outputs to `out`. Raises `DeeparError`."""
    with Client(question.url, token=question.token, timeout_s=question.timeout_s) as client:
        try:
            info = client.model(question.model)
            given = _gathered(info, question.inputs, _normalization(question, info))
            begin_s = time.perf_counter()
            answer = client.infer(question.model, given, **question.parameters)
            delay_s = time.perf_counter() - begin_s
        except InputError as error:
            raise ConfigError(f"--input: {error}") from None
        except InferenceError as error:
            raise _explained(error, question.url) from None
    if out is not None:
        arrays: dict[str, Any] = dict(answer.outputs)
        np.savez(out, **arrays)
    if as_json:
        print(json_text(_as_json(answer, delay_s)))
    else:
        _show(answer, info, delay_s, out)


def _normalization(question: Question, model: ModelInfo) -> Normalization:
    """From the options, else from the model's metadata, else from 0 to 1."""
    usual = Normalization()
    mean = tuple(question.mean or _floats(model.parameters.get("mean")) or usual.mean)
    std = tuple(question.std or _floats(model.parameters.get("std")) or usual.std)
    if not all(std):
        raise ConfigError("--std: must not be 0")
    return Normalization(mean, std)


def _explained(error: InferenceError, url: str) -> DeeparError:
    if error.status == 0 and error.repeatable:
        return ConfigError(
            str(error), remedy="start an endpoint: deepar up deploy/serve.toml, or a device with --serve 127.0.0.1:8600"
        )
    if error.status == 401:
        return ConfigError(f"{url}: {error}", remedy="pass --token-file, or set DEEPAR_TOKEN")
    return DeeparError(str(error) if url in str(error) else f"{url}: {error}")


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values] if isinstance(values, list) else []


def _gathered(model: ModelInfo, words: Sequence[str], normalization: Normalization) -> dict[str, Any]:
    """The inputs by name. Raises `ConfigError`."""
    names = [one.name for one in model.inputs]
    types = {one.name: one.dtype for one in model.inputs}
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
    return {name: _with_float_type(array, types.get(name)) for name, array in found.items()}


def _with_float_type(array: Array, wanted: str | None) -> Array:
    """The array with the model's type if both are floating-point numbers: numpy writes float64 unless told otherwise."""
    if wanted is not None and array.dtype.kind == "f" and np.dtype(wanted).kind == "f":
        return array.astype(wanted, copy=False)
    return array


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
    """Where the answer was computed and what it took, beside the prediction; the last time is the client's own."""
    told = answer.parameters
    kind = told.get("deepar_kind")
    words = []
    if kind:
        words.append(f"computed on {kind}" + (f" through {told['deepar_edge']}" if told.get("deepar_edge") else ""))
        if "deepar_measured_s" in told and "deepar_predicted_s" in told:
            measured, predicted = (
                format_seconds(float(told[f"deepar_{word}_s"])) for word in ("measured", "predicted")
            )
            words[0] += f" in {measured} (predicted {predicted})"
    words.append(f"{format_seconds(delay_s)} to the answer")
    return "; ".join(words)
