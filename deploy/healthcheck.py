"""`deepar healthcheck`: is a service ready? Containers ask every few seconds, so this imports next to nothing."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Annotated

import typer

from bus.errors import BusUnavailableError, ConfigError
from bus.json_text import json_text


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
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            body, ready = json.loads(answer.read()), answer.status == 200
    except urllib.error.HTTPError as error:
        body, ready = json.loads(error.read() or b"{}"), False
    except (OSError, ValueError) as error:
        raise BusUnavailableError(f"{url} does not answer: {error}") from None
    typer.echo(json_text(body))
    if not ready:
        raise typer.Exit(1)
