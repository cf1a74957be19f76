"""`deepar infer`: send an input of one's own to an endpoint, and show the answer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bus.errors import ConfigError
from bus.text.units import parse_duration
from deepar.defaults import DEFAULT_URL
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import AsJson
from deploy.console_output.writable import writable_file


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

    def token(self) -> str | None:
        """The token, if there is one. Raises `ConfigError`."""
        if self.token_file is None:
            return os.environ.get("DEEPAR_TOKEN")
        try:
            return self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {self.token_file}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How pixels become numbers: (pixel - mean) / std."""

    mean: Annotated[
        list[float] | None,
        typer.Option(help="Subtract this from each pixel; once, or once per channel. Default: the model's, else 0."),
    ] = None
    std: Annotated[
        list[float] | None,
        typer.Option(help="Divide each pixel by this; once, or once per channel. Default: the model's, else 255."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where the request may be computed, and how exactly."""

    placement: Annotated[
        str | None,
        typer.Option(metavar="TIERS", help="Tiers that may compute, like device+edge, or tiers that may not: -cloud."),
    ] = None
    priority: Annotated[int | None, typer.Option(min=1, help="1 is the most urgent.")] = None
    min_agreement: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="Allow lossy codecs on the links whose measured agreement is at least this, like 0.995. "
            "Default: lossless ones only.",
        ),
    ] = None

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
    from deploy.console_output.inference import Question, ask  # imported here: HTTP and numpy are slow to import

    question = Question(
        url=endpoint.url,
        token=endpoint.token(),
        timeout_s=parse_duration(endpoint.timeout, "--timeout"),
        model=model,
        inputs=inputs,
        mean=image.mean or (),
        std=image.std or (),
        parameters=place.parameters(),
    )
    if output.out is not None:
        writable_file("--output", output.out, suffixes=(".npz",))
    ask(question, output.out, as_json=output.as_json)
