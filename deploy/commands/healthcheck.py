"""`deepar healthcheck`: readiness probe client. Containers run it every few seconds, so it imports very little."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Annotated

import typer

from bus.errors import ConfigError, DeeparError
from bus.text.json_text import json_text

MAX_ANSWER_BYTES = 65_536
SHOWN = 80
"""Maximum length of an unexpected answer in the error text."""


class NoProbeError(DeeparError):
    """The URL does not answer, or its answer is not that of a DeePar probe."""


def healthcheck(
    url: Annotated[
        str | None, typer.Argument(help="URL of the probe. Default: /readyz on DEEPAR_HTTP_PORT of this machine.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait.")] = 3.0,
) -> None:
    """Query whether a service is ready; exit 0 if it is. For containers and scripts.

    Example: `deepar healthcheck http://127.0.0.1:9100/readyz`
    """
    if url is None:
        port = os.environ.get("DEEPAR_HTTP_PORT")
        if not port:
            raise ConfigError(
                "no URL given and DEEPAR_HTTP_PORT is not set", remedy="set DEEPAR_HTTP_PORT, or pass a URL"
            )
        url = f"http://127.0.0.1:{port}/readyz"
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is not an http URL")
    status, content = _ask(url, timeout)
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise NoProbeError(
            f"{url} is not a DeePar probe: it answered {status}, {_shown(content)}",
            remedy="query /readyz or /livez on the port that DEEPAR_HTTP_PORT names",
        )
    typer.echo(json_text(body))
    if status != 200:
        raise typer.Exit(1)


def _ask(url: str, timeout_s: float) -> tuple[int, bytes]:
    """The status and the first bytes of the answer. Raises `NoProbeError`, `ConfigError`."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return answer.status, answer.read(MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(MAX_ANSWER_BYTES)
    except http.client.InvalidURL as error:
        raise ConfigError(f"{url} is not a valid URL: {error}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or error or type(error).__name__
        raise NoProbeError(
            f"{url} does not answer as an HTTP server: {_printable(getattr(why, 'strerror', None) or str(why))}",
            remedy="check that the service runs and which port DEEPAR_HTTP_PORT names",
        ) from None


def _shown(content: bytes) -> str:
    """The beginning of an answer that is not JSON, as one line."""
    text = _printable(content.decode("utf-8", "replace"))
    return f"'{text}'" if text else "nothing"


def _printable(text: str) -> str:
    """The first characters as one line, with dots for unprintable ones."""
    return "".join(letter if letter.isprintable() else "." for letter in " ".join(text.split())[:SHOWN])
