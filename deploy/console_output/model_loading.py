"""What the commands about models share: their arguments, loading with a bar, printing for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bus.text.json_text import json_text
from deploy.console_output import completion
from stages.models.files.choice import ModelChoice, parse_shapes
from stages.models.model import Model
from stages.zoo.registry import load_model

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A name from `deepar models list`, or a .tflite file.", autocompletion=completion.models
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Threads = Annotated[int, typer.Option(min=1, max=64, help="Number of threads for one inference.")]


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """What to expect of a model file, and what to choose in it."""

    sha256: Annotated[
        str | None, typer.Option("--sha256", help="Expected SHA-256 of the file; another hash is an error.")
    ] = None
    signature: Annotated[
        str | None, typer.Option("--signature", help="Signature to use. [default: the main subgraph's]")
    ] = None
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            "--input-shape", metavar="NAME=1x1280", help="Shape of an input that the file leaves open; repeatable."
        ),
    ] = None


def print_json(report: dict[str, Any]) -> None:
    """One object, one line, on stdout."""
    sys.stdout.write(json_text(report) + "\n")


def load(model: str, options: FileOptions) -> Model:
    """Load a model, with a progress bar while it is generated, copied or hashed."""
    choice = ModelChoice(options.signature, parse_shapes(options.input_shape or ()))
    with progress_bar("loading") as bar:
        return load_model(model, lambda what, done, total: bar(done, total, what), sha256=options.sha256, choice=choice)


@contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A progress bar on stderr that disappears at the end; call it with done, total, what."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(emoji=False, stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)

        def update(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{title} {what}".strip())

        yield update
