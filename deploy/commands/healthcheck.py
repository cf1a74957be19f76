"""`deepar healthcheck`: is a service ready? Containers ask every few seconds, so this imports next to nothing."""

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
"""Characters of a strange answer that are shown."""


class NoProbeError(DeeparError):
    """What was asked is no probe of ours, or does not answer."""


def healthcheck(
    url: Annotated[
        str | None, typer.Argument(help="What to ask. Default: /readyz on DEEPAR_HTTP_PORT of this machine.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait.")] = 3.0,
) -> None:
    """Ask a service whether it is ready; exit 0 if it is. For containers and scripts.

    Example: `deepar healthcheck http://127.0.0.1:9100/readyz`
    """
    if url is None:
        port = os.environ.get("DEEPAR_HTTP_PORT")
        if not port:
            raise ConfigError("nothing to ask", remedy="set DEEPAR_HTTP_PORT, or name a URL")
        url = f"http://127.0.0.1:{port}/readyz"
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is no http URL")
    status, content = _ask(url, timeout)
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise NoProbeError(
            f"{url} is no probe of ours: it answered {status}, {_shown(content)}",
            remedy="ask /readyz or /livez on the port that DEEPAR_HTTP_PORT named",
        )
    typer.echo(json_text(body))
    if status != 200:
        raise typer.Exit(1)


def _ask(url: str, timeout_s: float) -> tuple[int, bytes]:
    """The status and the first bytes of what is answered. Raises `NoProbeError`, `ConfigError`."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return answer.status, answer.read(MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(MAX_ANSWER_BYTES)
    except http.client.InvalidURL as error:
        raise ConfigError(f"{url} is no URL: {error}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or error or type(error).__name__
        raise NoProbeError(
            f"{url} does not answer as an HTTP server: {_printable(getattr(why, 'strerror', None) or str(why))}",
            remedy="check that the service runs and which port DEEPAR_HTTP_PORT names",
        ) from None


def _shown(content: bytes) -> str:
    """The begin of an answer that is no JSON, as one line."""
    text = _printable(content.decode("utf-8", "replace"))
    return f"'{text}'" if text else "nothing"


def _printable(text: str) -> str:
    """The first characters on one line, what cannot be printed as dots."""
    return "".join(letter if letter.isprintable() else "." for letter in " ".join(text.split())[:SHOWN])
